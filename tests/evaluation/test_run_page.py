from torch import nn

from acl import AnalyticConv2d
from evaluation.run_page import render_run_page
from tests.reporting.helpers import make_record


def test_page_escapes_names() -> None:
    layer_name, title = "<script>alert(1)</script>", "a & <b> \"c\" 'd'"
    model = nn.Sequential()
    model.add_module(layer_name, AnalyticConv2d(1, 2, 3, arrangement="G100%"))
    config = {"model": {"backbone": title}, "data": {"name": title, "title": title}}
    machine, versions = {"device": title, "threads": 1}, {"torch": title}
    record = make_record(0, 90.0, config=config, commit=title, machine=machine, versions=versions)
    page = render_run_page(record, model, model, {}, {}, None, title)
    escaped = "a &amp; &lt;b&gt; &#34;c&#34; &#39;d&#39;"
    assert page.count(escaped) >= 5 and title not in page and "<b>" not in page
    assert "Layer &lt;script&gt;alert(1)&lt;/script&gt;" in page and layer_name not in page
    assert 'data-title="&lt;script&gt;alert(1)&lt;/script&gt;, input channel 0' in page
