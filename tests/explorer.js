// Runs in docs/explorer.html, for test_explorer.py: computes `outputs` from `inputs`.
const outputs = {initial: panel.kernel};
const decode = text => Uint8Array.from(atob(text), character => character.charCodeAt(0)).buffer;
const list = values => Array.from(values);
const computeAll = layer => Array.from({length: countSlots(layer)}, (_, slot) => list(computeKernel(layer.getKernel(slot)).values));
const tiles = () => document.querySelectorAll("#opened .tile");

outputs.kinds = Object.fromEntries(Object.entries(KINDS).map(([symbol, kind]) => [symbol, {...kind,
  akps: kind.akps.map(akp => ({...akp, ranges: [1, 5, 11].map(akp.range)})),
  extendedAkps: kind.extendedAkps.map(akp => ({...akp, ranges: [1, 5, 11].map(akp.range)}))}]));
outputs.kernels = inputs.kernels.map(kernel => list(computeKernel(kernel).values));
outputs.formulas = inputs.kernels.map(formatFormula);
outputs.shared = inputs.kernels.map(kernel => list(computeKernel(parseHash(formatHash(kernel))).values));
outputs.arrangements = inputs.arrangements.map(([text, channels, out, per]) => {
  try { return fillLayer(text, channels, out, per); } catch (error) { return error.message; }
});
outputs.counts = inputs.counted.map(([text, per, family, amplitude]) =>
  countLayer({counts: fillLayer(text, 3, 64, per), per, family, amplitude, channels: 3, out: 64, size: 7, image: 9}));
const image = {values: inputs.image.flat(), height: inputs.image.length, width: inputs.image[0].length};
outputs.responses = inputs.kernels.slice(0, 40).map(kernel => list(correlate(image, computeKernel(kernel).values, kernel.size).values));
outputs.spectrum = list(computeSpectrum(inputs.image.flat(), [image.height, image.width], 9));

outputs.damaged = Object.entries(inputs.damaged).map(([name, content]) => {
  openFile(name, decode(content));
  return find("#messages li").textContent;
});
outputs.files = Object.fromEntries(Object.entries(inputs.files).map(([name, content]) => {
  const count = opened.layers.length;
  openFile(name, decode(content));
  return [name, opened.layers.slice(count).map(layer => [layer.name, computeAll(layer)])];
}));

const choose = (file, name) => {
  find("#opened select").value = opened.layers.findIndex(layer => layer.file === file && layer.name === name);
  find("#opened select").dispatchEvent(new Event("change"));
};
const move = () => {
  for (const slider of document.querySelectorAll("#panel input[type=range]")) {
    slider.value = Number(slider.min) + 0.3 * (slider.max - slider.min);
    slider.dispatchEvent(new Event("input"));
  }
  document.querySelector("#panel input[type=range]")?.dispatchEvent(new Event("change"));
  return {python: panel.python.textContent, values: list(computeKernel(panel.kernel).values)};
};
outputs.copied = inputs.copied.map(([file, name, slot]) => {
  choose(file, name);
  tiles()[slot].click();
  return move();
});
outputs.own = inputs.own.map(kernel => {
  panel.show(kernel);
  return move();
});
outputs.address = location.hash;
outputs.addressed = panel.kernel;

openFile("other/akps.safetensors", decode(inputs.foreign));
choose("F32.safetensors", "placed");
tiles()[11].click();
outputs.foreign = panel.note.textContent;
openFile("akps.safetensors", decode(inputs.history));
tiles()[11].click();
outputs.changes = [panel.note.textContent, panel.changes.textContent, list(computeKernel(panel.context.original.kernel).values)];
openFile("other.safetensors", decode(inputs.foreignOriginal));
openFile("original.safetensors", decode(inputs.original));
choose("resnet18_conv1.json", "fit");
tiles()[5].click();
outputs.original = [panel.figures.original.title.textContent, list(panel.getOriginal(computeKernel(panel.kernel).values))];

panel.show({kind: "Lg", akps: {sigma: 1}});
const number = document.querySelector("#panel .slider input[type=number]");
number.value = "0.2";
number.dispatchEvent(new Event("input"));
outputs.tooLow = [document.querySelector("#panel .slider .error").textContent, panel.kernel.akps.sigma];
document.querySelector("#panel [value=Tf]").click();
outputs.switched = panel.kernel;
outputs.unlabeled = [...document.querySelectorAll("input, select, button, canvas[role]")]
  .filter(node => !(node.closest("[hidden]") || node.labels?.length || node.ariaLabel || node.textContent)).map(node => node.outerHTML);
tiles()[0].focus();
tiles()[0].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true}));
outputs.focused = document.activeElement.ariaLabel;
outputs.tabStops = document.querySelectorAll("#opened .tile[tabindex='0']").length;
outputs.hashErrors = inputs.hashes.map(hash => { try { parseHash(hash); return ""; } catch (error) { return error.message; } });
outputs.overflow = document.documentElement.scrollWidth - innerWidth;
return JSON.stringify(outputs);
