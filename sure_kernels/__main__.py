"""`python -m sure_kernels`: what works here."""

import sys

from sure_kernels.doctor import doctor

sys.exit(doctor())
