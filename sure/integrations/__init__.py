"""The losses inside other frameworks. nnU-Net looks for trainers in this folder: see `nnunet`."""
