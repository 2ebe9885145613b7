"""The analytic convolutional layer (ACL): convolutions whose kernels are formulas with a few learned parameters."""

from acl import explain, kernels
from acl.arrangement import Arrangement
from acl.convert import convert, fold
from acl.fit import fit_kernels
from acl.fit_result import Fit
from acl.inspection import akp_parameters, analytic_layers, param_groups, summary
from acl.layer import AnalyticConv2d
from acl.metric import Metric, output_error
from acl.options import LayerOptions
from acl.refine import refine_jointly
from acl.serialization import load, read_info, save, serialize
from acl.transform import UnsuitableFormulasError, rescale, rotate

__all__ = [
    "AnalyticConv2d",
    "Arrangement",
    "Fit",
    "LayerOptions",
    "Metric",
    "UnsuitableFormulasError",
    "akp_parameters",
    "analytic_layers",
    "convert",
    "explain",
    "fit_kernels",
    "fold",
    "kernels",
    "load",
    "output_error",
    "param_groups",
    "read_info",
    "refine_jointly",
    "rescale",
    "rotate",
    "save",
    "serialize",
    "summary",
]
