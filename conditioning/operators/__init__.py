"""Linear operators that are known by their products: Hessian, Gauss-Newton, Jacobian."""

from conditioning.operators.base import (
    FunctionOperator,
    LinearOperator,
    MatrixOperator,
    as_operator,
    dense_bytes,
)
from conditioning.operators.gauss_newton import GaussNewtonOperator
from conditioning.operators.hessian import HessianOperator
from conditioning.operators.jacobian import JacobianOperator

__all__ = [
    "FunctionOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "JacobianOperator",
    "LinearOperator",
    "MatrixOperator",
    "as_operator",
    "dense_bytes",
]
