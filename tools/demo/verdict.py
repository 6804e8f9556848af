"""What came out, in words."""

from results import Demo, mean_score

METHODS = dict(student_sel='the selective teacher (SEL)', student_fit='the fit loss (FIT)')
RIVALS = dict(student_kd='plain distillation', student='the student alone')
SHORT = dict(
    student='alone',
    student_kd='with plain distillation',
    student_sel='with SEL',
    student_fit='with FIT',
)
MARGIN = 3.0  # points of the mean score; one run cannot tell less apart


def verdict(demo: Demo) -> str:
    """Say what came out, whatever it was."""
    students, measure = demo.students, demo.measure
    first = '; '.join(
        f'{text} came out '
        + ' and '.join(
            f'{standing(students[name].mean - students[rival].mean)} {words}'
            for rival, words in RIVALS.items()
        )
        for name, text in METHODS.items()
        if name in students
    )
    means = in_words({name: model.mean for name, model in students.items()})
    mixed = in_words({n: mean_score(model.scores, demo.mixed) for n, model in students.items()})
    return (
        f'{first[0].upper()}{first[1:]}. The {measure.mean} is {means}. On '
        f'{" and ".join(demo.mixed)}, which the teacher mixes up, the {measure.single} is {mixed}.'
    )


def standing(difference: float) -> str:
    """Say how a score stands to another, from their difference in points."""
    if abs(difference) <= MARGIN:
        return f'within {MARGIN:.0f} points of'
    return f'{abs(difference):.1f} points {"above" if difference > 0 else "below"}'


def in_words(scores: dict[str, float]) -> str:
    """Say the scores of the students."""
    said = [f'{score:.1f} {SHORT[name]}' for name, score in scores.items()]
    return f'{", ".join(said[:-1])} and {said[-1]}'
