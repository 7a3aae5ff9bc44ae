"""PriUS's soft losses: sigmoid indicators in place of thresholds, and pairs of voxels within a class."""
