import pytest
import torch

from mmdistill_ext.functional import check_labels


def test_labels_outside_the_classes_are_named():
    check_labels(torch.tensor([[0, 4], [255, 1]]), 5)
    check_labels(torch.tensor([], dtype=torch.long), 5)
    with pytest.raises(ValueError, match=r'\[0, 5\).*values -1, 5, 200\.'):
        check_labels(torch.tensor([0, 5, 200, -1, 255, 5]), 5)


def test_the_ignored_label_is_a_choice():
    labels = torch.tensor([0, 1, -100])
    check_labels(labels, 2, ignore_index=-100)
    with pytest.raises(ValueError, match='values -100'):
        check_labels(labels, 2)


def test_few_of_many_wrong_values_are_shown():
    with pytest.raises(ValueError, match=r'11, \.\.\.\.'):
        check_labels(torch.arange(200), 2)
