"""Slow, plain oracles for the maths tests: arbitrary-precision loops that share no code with it."""

import math

import mpmath
import torch
from hypothesis import settings
from hypothesis import strategies as st

# Every property test: as many examples as keep the whole layer under a minute, the same each run.
PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def digits_for(values, tau):
    """Decimal digits that keep sums of e^(v / tau) exact, down to gaps of 1e-300 in v."""
    spread = (max(values) - min(values)) / tau
    return 350 + int(spread / math.log(10))


def exponentials(row, tau):
    return [mpmath.exp(mpmath.mpf(value) / mpmath.mpf(tau)) for value in row]


def softmax(row, tau):
    weights = exponentials(row, tau)
    total = mpmath.fsum(weights)
    return [weight / total for weight in weights]


def msp(row, tau=1.0):
    with mpmath.workdps(digits_for(row, tau)):
        return float(max(softmax(row, tau)))


def odin(row, tau=1000.0):
    return msp(row, tau)


def max_logit(row):
    largest = row[0]
    for value in row:
        if value > largest:
            largest = value
    return float(largest)


def energy(row, tau=1.0):
    with mpmath.workdps(digits_for(row, tau)):
        return float(mpmath.mpf(tau) * mpmath.log(mpmath.fsum(exponentials(row, tau))))


def neg_entropy(row, tau=1.0):
    with mpmath.workdps(digits_for(row, tau)):
        return float(mpmath.fsum(p * mpmath.log(p) for p in softmax(row, tau)))


def gen(row, gamma=0.1, top_m=100):
    with mpmath.workdps(digits_for(row, 1.0)):
        largest = sorted(softmax(row, 1.0), reverse=True)[:top_m]
        return -float(mpmath.fsum(p**gamma * abs(1 - p) ** gamma for p in largest if p < 1))


def gl_mcm(row, patches, tau=1.0, weight=1.0):
    return msp(row, tau) + weight * max(msp(patch, tau) for patch in patches)


def neg_label(row, negative, tau=0.01, groups=1):
    with mpmath.workdps(digits_for([*row, *negative], tau)):
        id_sum = mpmath.fsum(exponentials(row, tau))
        sums = [mpmath.fsum(exponentials(negative[g::groups], tau)) for g in range(groups)]
        return float(mpmath.fsum(id_sum / (id_sum + s) for s in sums) / groups)


def neg_mcm(row, negative, tau=1.0):
    with mpmath.workdps(digits_for([*row, *negative], tau)):
        largest = max(exponentials(row, tau))
        return float(largest / mpmath.fsum(exponentials([*row, *negative], tau)))


def delta_energy_terms(row, tau=1.0, c=1, low=0.0):
    """The energy change of setting the j-th largest similarity alone to `low`, j = 1..c."""
    with mpmath.workdps(digits_for([*row, low], tau)):
        weights = sorted(exponentials(row, tau), reverse=True)
        replaced = mpmath.exp(mpmath.mpf(low) / mpmath.mpf(tau))
        energy_before = -mpmath.log(mpmath.fsum(weights))
        terms = []
        for j in range(c):
            others = [weights[n] for n in range(len(weights)) if n != j]
            energy_after = -mpmath.log(replaced + mpmath.fsum(others))
            terms.append(energy_after - energy_before)
        return [float(term) for term in terms]


def delta_energy(row, tau=1.0, c=1, low=0.0):
    return math.fsum(delta_energy_terms(row, tau, c, low)) / c


def confidence_control(id_logits, train_accuracy):
    return math.fsum((msp(row) - train_accuracy) ** 2 for row in id_logits)


def uniform_deviation(ood_logits):
    with mpmath.workdps(50):
        shares = [p for row in ood_logits for p in softmax(row, 1.0)]
        return float(mpmath.fsum(abs(p - mpmath.mpf(1) / len(ood_logits[0])) for p in shares))


def tail_contrast(id_projections, ood_projections, labels, tail_classes, temperature=0.07):
    """Anchor by anchor, positive by positive."""
    images = zip(id_projections, labels, strict=True)
    views = [(view, y) for image, y in images if tail_classes[y] for view in image]
    costs = []
    with mpmath.workdps(50):
        for i, (anchor, own) in enumerate(views):

            def weight(other, anchor=anchor):
                product = mpmath.fsum(a * b for a, b in zip(anchor, other, strict=True))
                return mpmath.exp(product / mpmath.mpf(temperature))

            rest = [pair for j, pair in enumerate(views) if j != i]
            total = mpmath.fsum([weight(v) for v, _ in rest] + [weight(v) for v in ood_projections])
            terms = [-mpmath.log(weight(view) / total) for view, label in rest if label == own]
            costs.append(mpmath.fsum(terms) / len(terms))
        return float(mpmath.fsum(costs) / max(1, len(costs)))


def open_sampling(ood_logits, drawn_labels, class_weights):
    with mpmath.workdps(50):
        drawn = [class_weights[label] for label in drawn_labels]
        costs = [
            -weight * mpmath.log(softmax(row, 1.0)[label])
            for row, label, weight in zip(ood_logits, drawn_labels, drawn, strict=True)
        ]
        return float(mpmath.fsum(costs) / mpmath.fsum(drawn))


def adjusted_cross_entropy(id_logits, labels, class_prior, tau=1.0):
    """-log of p_y^tau e^{f_y} / sum_k p_k^tau e^{f_k}, image by image."""
    with mpmath.workdps(50):
        powers = [mpmath.mpf(share) ** tau for share in class_prior]
        costs = []
        for row, label in zip(id_logits, labels, strict=True):
            weights = [p * mpmath.exp(f) for p, f in zip(powers, row, strict=True)]
            costs.append(-mpmath.log(weights[label] / mpmath.fsum(weights)))
        return float(mpmath.fsum(costs) / len(costs))


def assert_close(actual, expected, *, rtol, atol=0.0):
    """Assert |actual - expected| <= rtol * |expected| + atol row by row, in float64."""
    torch.testing.assert_close(
        actual.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol
    )


@st.composite
def similarities(draw, *, max_rows=4, min_classes=1, max_classes=8):
    """(N, K) float64 cosines with ties, zeros, both ends and everything between."""
    num_rows = draw(st.integers(1, max_rows))
    num_classes = draw(st.integers(min_classes, max_classes))
    value = st.one_of(
        st.floats(-1, 1, allow_subnormal=False),
        st.sampled_from([-1.0, 0.0, 0.25, 0.25 + 2**-40, 1.0]),
    )
    rows = draw(
        st.lists(
            st.lists(value, min_size=num_classes, max_size=num_classes),
            min_size=num_rows,
            max_size=num_rows,
        )
    )
    return torch.tensor(rows, dtype=torch.float64)
