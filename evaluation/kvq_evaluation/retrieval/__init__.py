"""Retrieval from long contexts, on texts that are made and not downloaded."""

from kvq_evaluation.retrieval.documents import RETRIEVAL_TASKS
from kvq_evaluation.retrieval.examples import RetrievalExample, make_examples
from kvq_evaluation.retrieval.scoring import RetrievalRow, evaluate_retrieval

__all__ = [
    "RETRIEVAL_TASKS",
    "RetrievalExample",
    "RetrievalRow",
    "evaluate_retrieval",
    "make_examples",
]
