"""The claims: what is predicted, by whom, how it is measured, and what would count as true."""

from __future__ import annotations

from experiments.claims import Claim, Tolerance

_PAPER = "Li, Jiao, Han, Weissman, arXiv:1611.01186"
_THEOREM = f"{_PAPER}, main theorem"
_DERIVED = "derived for this project (conditioning.theory)"
_ROUNDING = "float64 rounding of the products is near 1e-13; any other law misses by far more"

_n2 = [
    Claim(
        "n2.kappa",
        f"{_THEOREM}, part 2",
        "With shortcuts of depth 2 the condition number at zero is that of D = Σ_XX − Σ_YX, at "
        "every depth.",
        "κ(D)",
        Tolerance.within(rtol=1e-3),
        "an enclosure by Lanczos at a failure probability of 1e-6 is up to 1e-4 wide; the claims "
        "about the spectrum go down to rounding",
        "Lanczos at L = 2 ... 1024 on all samples, and all eigenvalues where n <= 4096.",
    ),
    Claim(
        "n2.spectrum",
        _DERIVED,
        "The spectrum is ±σ_i(D), each dR times.",
        0.0,
        Tolerance.within(atol=1e-10),
        _ROUNDING,
        "Largest distance of the sorted spectra with multiplicities, relative to the largest "
        "eigenvalue, by the dense Hessian where n <= 4096.",
    ),
    Claim(
        "n2.exhausted",
        _DERIVED,
        "The Krylov space closes and condition_number says so, at every depth.",
        1.0,
        Tolerance.within(),
        "a status is said or not",
        "Status 'exhausted' at L = 2 ... 1024.",
    ),
    Claim(
        "n2.products",
        _DERIVED,
        "It takes at most 2d + 1 products, however deep the network.",
        "2d + 1",
        Tolerance.at_most(),
        "a count",
        "Products spent by condition_number, the one that measures the noise included.",
    ),
    Claim(
        "n2.index",
        _DERIVED,
        "Half of the eigenvalues are negative.",
        0.5,
        Tolerance.within(atol=1e-12),
        "a count",
        "Index by the dense Hessian where n <= 4096; enclosed by Lanczos beyond.",
    ),
    Claim(
        "n2.smooth",
        f"{_THEOREM}, part 2",
        "With smooth activations that vanish at zero (mid, post; any before) the condition number "
        "is that of M = (1/m) Σ (x − y) σ_pre(x)ᵀ.",
        "κ(M)",
        Tolerance.within(rtol=1e-3),
        "as n2.kappa",
        "tanh, GELU, shifted sigmoid and shifted softplus, each before, between and after the "
        "matrices, and everywhere, at R = 1 and 2 (paper: 4 too), on all samples.",
    ),
    Claim(
        "n2.smooth-spectrum",
        f"{_THEOREM}, part 2",
        "Their spectrum is ±σ'_mid(0) σ'_post(0) σ_i(M), each dR times.",
        0.0,
        Tolerance.within(atol=1e-10),
        _ROUNDING,
        "As n2.spectrum.",
    ),
    Claim(
        "n2.violated",
        f"{_THEOREM}, its assumption broken on purpose",
        "The same for a plain sigmoid in the middle, which does not vanish at zero: by the "
        "theorem this is expected to fail.",
        "κ(M)",
        Tolerance.within(rtol=1e-2),
        "far wider than rounding: a failure here is not one of digits",
        "As n2.smooth, at R = 1, 2, 4.",
    ),
    Claim(
        "n2.violated-gradient",
        f"{_THEOREM}, its assumption broken on purpose",
        "With the plain sigmoid zero is not even stationary.",
        1e-3,
        Tolerance.at_least(),
        "the gradients measured with the assumption are below 1e-12",
        "Norm of the gradient at zero.",
    ),
]

_n3 = [
    Claim(
        "n3.stationary",
        f"{_THEOREM}, part 1",
        "With shortcuts of depth n all derivatives of order 1 ... n − 1 vanish at zero.",
        0.0,
        Tolerance.within(atol=1e-12),
        "the derivative of order n is of size one; these are exactly zero or rounding",
        "Largest derivative along random lines by nested autograd, and largest entry of the "
        "gradient; n = 2, 3, 4, linear and tanh.",
    ),
    Claim(
        "n3.order",
        _DERIVED,
        "The derivative of order n does not vanish: it is n! Σ_r ⟨D, W^{r,n} ... W^{r,1}⟩.",
        "n! Σ⟨D, W...W⟩",
        Tolerance.within(rtol=1e-9),
        _ROUNDING,
        "The same lines.",
    ),
    Claim(
        "n3.zero-hessian",
        f"{_THEOREM}, part 1",
        "For n >= 3 the Hessian at zero is zero, and condition_number says so in words.",
        1.0,
        Tolerance.within(),
        "said or not",
        "n = 3, 4 at several depths, linear and tanh.",
    ),
]

_n1 = [
    Claim(
        "n1.isotropic",
        _DERIVED,
        "Depth 1, white inputs, D = s I: κ = (L(1 + s) − s)/s.",
        "(L(1+s) − s)/s",
        Tolerance.within(rtol=1e-3),
        "as n2.kappa",
        "s = 0.6; L = 2 ... 32.",
    ),
    Claim(
        "n1.isotropic-spectrum",
        _DERIVED,
        "Its spectrum has the four predicted values with the predicted multiplicities.",
        0.0,
        Tolerance.within(atol=1e-10),
        _ROUNDING,
        "Sorted dense spectra, as n2.spectrum; s = 0.6 and 1.1.",
    ),
    Claim(
        "n1.nullity",
        _DERIVED,
        "For s = 1.1 and L = 11 exactly d(d − 1)/2 eigenvalues are zero.",
        "d(d − 1)/2",
        Tolerance.within(),
        "a count",
        "Nullity in the result, by the dense Hessian; κ leaves them out.",
    ),
    Claim(
        "n1.zero-targets",
        _DERIVED,
        "For Y = 0: κ = (2L − 1) κ(Σ_XX).",
        "(2L − 1) κ(Σ_XX)",
        Tolerance.within(rtol=1e-6),
        "κ(Σ_XX) of the raw components multiplies the rounding",
        "The components before whitening; L = 2 ... 32.",
    ),
    Claim(
        "n1.hessian",
        f"{_THEOREM}, part 3",
        "The Hessian is the block matrix J⊗B + N⊗C + Nᵀ⊗Cᵀ of the data's moments.",
        0.0,
        Tolerance.within(atol=1e-10),
        _ROUNDING,
        "Sorted dense spectra on the data, L = 1 ... 32.",
    ),
    Claim(
        "n1.kappa10-linear",
        _DERIVED,
        "On the data κ₁₀ grows linearly with depth.",
        1.0,
        Tolerance.within(atol=0.15),
        "flat, root, or square growth would be 0, 0.5 or 2; short depths bend the curve",
        "Exponent of κ₁₀(2L) − κ₁₀(L) in L, by least squares over L = 2, 4, 8, 16, with its 95 % "
        "interval; the difference takes out the intercept.",
    ),
    Claim(
        "n1.kappa-erratic",
        _DERIVED,
        "The plain κ is erratic: a stray eigenvalue crosses zero at some depths.",
        10.0,
        Tolerance.at_least(),
        "linear growth would keep κ/L within a factor of 2 (as it does for κ₁₀)",
        "Largest over smallest κ/L for L = 2 ... 32.",
    ),
]

_rest = [
    Claim(
        "init.two-shortcut",
        f"{_PAPER}, figure 5",
        "κ₁₀ of the 2-shortcut net at 0.01 × Xavier does not change with depth.",
        "κ₁₀ at zero",
        Tolerance.within(rtol=0.05),
        "perturbations of relative size 0.01 move eigenvalues by about as much",
        "Every seed at L = 2 ... 32, against the exact value at zero.",
    ),
    Claim(
        "init.orthogonal",
        f"{_PAPER}, figure 5 (diverges); linear: {_DERIVED}",
        "κ₁₀ of the plain orthogonal net grows linearly with depth.",
        1.0,
        Tolerance.within(atol=0.15),
        "as n1.kappa10-linear",
        "The exponent of n1.kappa10-linear for each seed: mean and 95 % interval.",
    ),
    Claim(
        "init.rotation",
        _DERIVED,
        "The plain orthogonal net has the spectrum of the 1-shortcut net at zero with the targets "
        "rotated by its product.",
        0.0,
        Tolerance.within(atol=1e-10),
        _ROUNDING,
        "Sorted dense spectra, L = 2, 4, 8, every seed.",
    ),
    Claim(
        "init.xavier",
        f"{_PAPER}, figure 5",
        "κ₁₀ of the plain Xavier net explodes: above 1e5 at L = 16 and beyond.",
        1e5,
        Tolerance.at_least(),
        "10,000 times the others; beyond that float64 itself is the limit, so no value is claimed",
        "The certain lower bound of κ₁₀, every seed, L = 16 and 32.",
    ),
    Claim(
        "init.faster",
        f"{_PAPER}, figure 5",
        "Xavier is worse than orthogonal at every depth from 4 on.",
        1.0,
        Tolerance.at_least(),
        "an order, not a size",
        "Ratio of the two κ₁₀ of one seed (its certain lower bound): the smallest over seeds.",
    ),
    Claim(
        "relu.warning",
        _DERIVED,
        "With ReLU in the middle autograd returns H = 0 at zero, which is not the limit: the tool "
        "warns.",
        1.0,
        Tolerance.within(),
        "said or not",
        "HessianOperator at exact zero, R = 1, 2, 4.",
    ),
    Claim(
        "relu.limit",
        _DERIVED,
        "Next to zero the spectrum is that of the gated moments D_j, one for each hidden unit.",
        0.0,
        Tolerance.within(atol=1e-8),
        "weights of size 1e-6 leave terms of about their square",
        "Sorted dense spectra at 1e-6 × Xavier, every seed.",
    ),
    Claim(
        "check.pyhessian",
        "PyHessian 0.1 (Yao, Gholami, Keutzer, Mahoney, arXiv:1912.07145), independent code",
        "Its largest eigenvalue is ours, where its power iteration has a limit (depth 1).",
        "λ_max",
        Tolerance.within(rtol=1e-2),
        "its stopping rule watches stagnation, not the error",
        "L = 2 ... 16. For depth 2 the spectrum is symmetric and its iteration has none; the "
        "table shows what it returns.",
    ),
]

CLAIMS = (*_n2, *_n3, *_n1, *_rest)
