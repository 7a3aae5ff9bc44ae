"""Minimax coefficients for lgamma, digamma and trigamma of arguments x >= 1, highest power first.

With y = x + SHIFT, t = 1 / y and L = ln y:

    digamma(x)  = L + t P(t)
    lgamma(x)   = (x - 1/2) L - x + Q(t)
    trigamma(x) = t R(t)
    (x - 1) digamma(x) - lgamma(x) - (x - 1) = -L / 2 + W(t)

Fitted in the minimax sense on t in (0, 1 / (1 + SHIFT)]; fit errors 3e-9 to 1.2e-8. The shift is a sweet spot:
at 1/2 the same degree is a hundred times worse. The last form is what the KL term needs: it has a single
logarithm and does not cancel where the evidence is large.

digamma(x + 1) - ln x is smooth as well: with s = 1 / (x + EXCESS_SHIFT) it is s EXCESS(s), relative error 3e-8, and
its derivative -s^2 EXCESS_SLOPE(s), relative error 2e-7.

LOG1P: ln(1 + q) = q LOG1P(q) for q in [0, 1], relative error 6e-8. Kernels build softplus and the logarithm on it.
"""

SHIFT = 0.26171875
P = (-0.00428179977, 0.00136508793, -0.0190896206, -0.0838556439, -0.248435959, -0.761719108)
Q = (0.000862655637, -0.000361524115, 0.00638820929, 0.0419122726, 0.248441607, 0.657219768)
R = (0.0254983921, -0.00641394733, 0.0760309026, 0.251686275, 0.496852487, 0.761720181, 1.0)
W = (0.00545097096, -0.00702905655, 0.0260204151, 0.0801940188, 0.187729955, 0.464191437, -0.418938518)
EXCESS_SHIFT = 0.390625
EXCESS = (-8.75383557e-05, 0.00670743966, -0.000481442141, 0.0112433089, 0.111976936, 0.5)
EXCESS_SLOPE = (0.0031144643, -0.00656579885, 0.0378785115, -0.0033428412, 0.0339352012, 0.223943243, 0.500000101)
LOG1P = (
    0.00523268105,
    -0.0295052268,
    0.0782261342,
    -0.136632204,
    0.191059634,
    -0.248429745,
    0.33319062,
    -0.499994636,
    0.99999994,
)
