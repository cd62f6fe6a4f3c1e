"""The small trained target that engines in tests run, its draft, and their cost-scaled copies. A toy: see model/README.md."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
DRAFT = Path(__file__).parent / "draft"
