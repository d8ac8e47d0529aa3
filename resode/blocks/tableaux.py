"""Butcher tableaux of explicit Runge–Kutta methods, with embedded pairs.

A method with coefficients (a, b, c) makes the step from t to t + Δ by

    k_i = f(t + c_i Δ, h + Δ Σ_{j<i} a_ij k_j),    h(t + Δ) = h + Δ Σ_i b_i k_i

(Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, eq. II.1.8; "HNW" below). An embedded pair has a
second solution of the same stages, with weights b̂, of another order; the difference Δ Σ_i (b_i − b̂_i) k_i of the two
estimates the local error (HNW, section II.4). Every solution here is the one of the higher order (local extrapolation).
"""

from dataclasses import dataclass

from resode.errors import InvalidInput


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau of an explicit method (HNW, eq. II.1.8), with a second solution or without (section II.4).

    Args:
        name: what users call the method.
        order: the order p of the solution: its local error is O(Δ^(p+1)).
        a: the rows below the diagonal, the first one empty.
        b: the weights of the solution, one a stage.
        c: the times of the stages, as fractions of the step.
        embedded: the weights b̂ of the second solution, one a stage; None where there is none.
        embedded_order: the order of that second solution.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    embedded: tuple[float, ...] | None = None
    embedded_order: int | None = None

    @property
    def stages(self) -> int:
        """The number of stages, those that serve only the error estimate included."""
        return len(self.b)

    @property
    def adaptive(self) -> bool:
        """Whether a second solution estimates the error."""
        return self.embedded is not None

    @property
    def error(self) -> tuple[float, ...]:
        """b − b̂, the weights of the error estimate (HNW, section II.4).

        Raises:
            InvalidInput: when the method has no second solution.
        """
        if self.embedded is None:
            raise InvalidInput(
                f"{self.name} has no embedded solution to estimate its error with: use one of {ADAPTIVE}"
            )
        return tuple(b - second for b, second in zip(self.b, self.embedded, strict=True))

    @property
    def fsal(self) -> bool:
        """First same as last: the last stage is f(t + Δ, h(t + Δ)), the next step's first.

        Named and sought by Dormand & Prince 1980: a_sj = b_j, b_s = 0, c_s = 1; a step costs one evaluation less.
        """
        return self.b[-1] == 0.0 and self.c[-1] == 1.0 and self.a[-1] == self.b[:-1]

    @property
    def solution_stages(self) -> int:
        """How many leading stages the solution itself needs; those after them have b = 0."""
        return max(i for i, weight in enumerate(self.b, start=1) if weight != 0.0)


# Euler 1768, Institutiones calculi integralis I; HNW, section I.7.
EULER = Tableau("euler", 1, a=((),), b=(1.0,), c=(0.0,))

# Runge 1895, Über die numerische Auflösung von Differentialgleichungen, Math. Ann. 46; HNW, Table II.1.1.
MIDPOINT = Tableau("midpoint", 2, a=((), (1 / 2,)), b=(0.0, 1.0), c=(0.0, 1 / 2))

# The trapezoidal rule with a predictor by Euler's method. Heun 1900, Neue Methoden zur approximativen Integration der
# Differentialgleichungen einer unabhängigen Veränderlichen, Z. Math. Phys. 45.
HEUN = Tableau("heun", 2, a=((), (1.0,)), b=(1 / 2, 1 / 2), c=(0.0, 1.0))

# The least bound of the local error at two stages. Ralston 1962, Runge–Kutta methods with minimum error bounds,
# Math. Comp. 16.
RALSTON = Tableau("ralston", 2, a=((), (2 / 3,)), b=(1 / 4, 3 / 4), c=(0.0, 2 / 3))

# "The" Runge–Kutta method. Kutta 1901, Beitrag zur näherungsweisen Integration totaler Differentialgleichungen,
# Z. Math. Phys. 46; HNW, Table II.1.2, left.
RK4 = Tableau(
    "rk4",
    4,
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    c=(0.0, 1 / 2, 1 / 2, 1.0),
)

# The 3/8 rule. Kutta 1901, as above; HNW, Table II.1.2, right.
RK4_38 = Tableau(
    "rk4-38",
    4,
    a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    c=(0.0, 1 / 3, 2 / 3, 1.0),
)

# Bogacki & Shampine 1989, A 3(2) pair of Runge–Kutta formulas, Appl. Math. Lett. 2.
BOSH3 = Tableau(
    "bosh3",
    3,
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0.0),
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    embedded=(7 / 24, 1 / 4, 1 / 3, 1 / 8),
    embedded_order=2,
)

# From here on the tables keep the lines of their papers, which a formatter would break into one number a line.
# fmt: off

# Tsitouras 2011, Runge–Kutta pairs of order 5(4) satisfying only the first column simplifying assumption, Comput. Math.
# Appl. 62, Table 1. The coefficients solve the order conditions numerically and are no fractions; here they have the
# full double precision of later implementations. The table prints b̂_7 = 1/66 itself, but for the other six stages the
# differences b_i − b̂_i.
TSIT5 = Tableau(
    "tsit5", 5,
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
    ),
    b=(0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0.0),
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    embedded=(0.09468075576583945, 0.009183565540343254, 0.4877705284247616, 1.234297566930479, -2.7077123499835256,
              1.866628418170587, 1 / 66),
    embedded_order=4,
)

# Dormand & Prince 1980, A family of embedded Runge–Kutta formulae, J. Comput. Appl. Math. 6, RK5(4)7M; HNW,
# Table II.5.2. The second solution is Shampine's (1986, Some practical Runge–Kutta formulas, Math. Comp. 46), whose
# estimate is 2/3 of theirs: torchdiffeq, diffrax and JAX have it, so that a tolerance means the same here and there.
DOPRI5 = Tableau(
    "dopri5", 5,
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    embedded=(1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60),
    embedded_order=4,
)

# Prince & Dormand 1981, High order embedded Runge–Kutta formulae, J. Comput. Appl. Math. 7, RK8(7)13M: not the 8(5,3)
# method that HNW's code DOP853 has. The large fractions are the paper's approximations of irrational coefficients: in
# exact arithmetic they miss the order conditions by 6e-18.
DOPRI8 = Tableau(
    "dopri8", 8,
    a=(
        (),
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (29443841 / 614563906, 0.0, 0.0, 77736538 / 692538347, -28693883 / 1125000000, 23124283 / 1800000000),
        (16016141 / 946692911, 0.0, 0.0, 61564180 / 158732637, 22789713 / 633445777, 545815736 / 2771057229,
         -180193667 / 1043307555),
        (39632708 / 573591083, 0.0, 0.0, -433636366 / 683701615, -421739975 / 2616292301, 100302831 / 723423059,
         790204164 / 839813087, 800635310 / 3783071287),
        (246121993 / 1340847787, 0.0, 0.0, -37695042795 / 15268766246, -309121744 / 1061227803, -12992083 / 490766935,
         6005943493 / 2108947869, 393006217 / 1396673457, 123872331 / 1001029789),
        (-1028468189 / 846180014, 0.0, 0.0, 8478235783 / 508512852, 1311729495 / 1432422823,
         -10304129995 / 1701304382, -48777925059 / 3047939560, 15336726248 / 1032824649, -45442868181 / 3398467696,
         3065993473 / 597172653),
        (185892177 / 718116043, 0.0, 0.0, -3185094517 / 667107341, -477755414 / 1098053517, -703635378 / 230739211,
         5731566787 / 1027545527, 5232866602 / 850066563, -4093664535 / 808688257, 3962137247 / 1805957418,
         65686358 / 487910083),
        (403863854 / 491063109, 0.0, 0.0, -5068492393 / 434740067, -411421997 / 543043805, 652783627 / 914296604,
         11173962825 / 925320556, -13158990841 / 6184727034, 3936647629 / 1978049680, -160528059 / 685178525,
         248638103 / 1413531060, 0.0),
    ),
    b=(14005451 / 335480064, 0.0, 0.0, 0.0, 0.0, -59238493 / 1068277825, 181606767 / 758867731, 561292985 / 797845732,
       -1041891430 / 1371343529, 760417239 / 1151165299, 118820643 / 751138087, -528747749 / 2220607170, 1 / 4),
    c=(0.0, 1 / 18, 1 / 12, 1 / 8, 5 / 16, 3 / 8, 59 / 400, 93 / 200, 5490023248 / 9719169821, 13 / 20,
       1201146811 / 1299019798, 1.0, 1.0),
    embedded=(13451932 / 455176623, 0.0, 0.0, 0.0, 0.0, -808719846 / 976000145, 1757004468 / 5645159321,
              656045339 / 265891186, -3867574721 / 1518517206, 465885868 / 322736535, 53011238 / 667516719, 2 / 45,
              0.0),
    embedded_order=7,
)
# fmt: on

# Heun's method, as above, with Euler's as the second solution (HNW, section II.4).
ADAPTIVE_HEUN = Tableau("adaptive_heun", 2, HEUN.a, HEUN.b, HEUN.c, embedded=(1.0, 0.0), embedded_order=1)

TABLEAUX: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (EULER, MIDPOINT, HEUN, RALSTON, RK4, RK4_38, BOSH3, TSIT5, DOPRI5, DOPRI8, ADAPTIVE_HEUN)
}

# The names of the embedded pairs.
ADAPTIVE: tuple[str, ...] = tuple(name for name, tableau in TABLEAUX.items() if tableau.adaptive)
