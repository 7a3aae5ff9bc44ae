"""Data sets on disk, their checks, loading and saving, and synthetic phantoms."""

from sure.data.checks import check_dataset, format_faults, spacings_differ
from sure.data.layouts import Case, Dataset, Fault, discover, files_digest
from sure.data.loading import (
    IGNORE,
    EvaluationCase,
    TrainingData,
    load_case,
    load_image,
    load_label,
    normalise,
    patient_of,
    split_cases,
)
from sure.data.nifti import UnreadableError, read_nifti, save_nifti
from sure.data.phantoms import phantom, write_phantoms

__all__ = [
    "IGNORE",
    "Case",
    "Dataset",
    "EvaluationCase",
    "Fault",
    "TrainingData",
    "UnreadableError",
    "check_dataset",
    "discover",
    "files_digest",
    "format_faults",
    "load_case",
    "load_image",
    "load_label",
    "normalise",
    "patient_of",
    "phantom",
    "read_nifti",
    "save_nifti",
    "spacings_differ",
    "split_cases",
    "write_phantoms",
]
