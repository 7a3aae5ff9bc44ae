"""Training, evaluation and reporting for evidential segmentation on top of `sure_kernels`."""

__version__ = "0.1.0"
