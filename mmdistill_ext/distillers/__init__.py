"""Registered models that train a student with something besides its labels."""

from mmdistill_ext.distillers.collaborative import CollaborativeDistiller
from mmdistill_ext.distillers.teacher_student import build_teacher_student

__all__ = ['CollaborativeDistiller', 'build_teacher_student']
