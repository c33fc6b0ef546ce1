"""What the YAML of `paper7` cannot say: MMLU of 57 subjects in turn, row limits, and ROUGE-L of any script."""

import re
from itertools import chain
from pathlib import Path

import datasets
import pandas as pd
from huggingface_hub import hf_hub_download
from rouge_score.rouge_scorer import RougeScorer

ROWS, SHOTS = 20, 5  # of each subject
ASKED = {
    "en": ("The following are multiple choice questions (with answers) about {}.\n\n", "Answer:"),
    "ru": ("Ниже приведены вопросы с множественным выбором (с ответами).\n\n", "Ответ:"),
}
SUBJECTS = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security
    conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts
    high_school_biology high_school_chemistry high_school_computer_science high_school_european_history
    high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_mathematics
    high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
    high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence
    logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes
    moral_scenarios nutrition philosophy prehistory professional_accounting professional_law
    professional_medicine professional_psychology public_relations security_studies sociology us_foreign_policy
    virology world_religions
""".split()


def mmlu(path: str, language: str, **_) -> dict:
    """Rows of all subjects in turn, each with five solved questions of its own subject in its prompt."""
    headline, asks = ASKED[language]

    def asked(row) -> str:
        choices = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", row[f"choices_{language}"]))
        return f"{row[f'question_{language}']}\n{choices}{asks}"

    subjects = []
    for subject in SUBJECTS:
        solved = (f"{asked(row)} {'ABCD'[row['answer']]}\n\n" for row in _read(path, subject, "dev")[:SHOTS])
        before = headline.format(subject.replace("_", " ")) + "".join(solved)
        rows = _read(path, subject, "test")[:ROWS]
        subjects.append([{"prompt": before + asked(row), "answer": row["answer"]} for row in rows])
    # So that the first n rows are of all subjects.
    return {"test": datasets.Dataset.from_list(list(chain.from_iterable(zip(*subjects))))}


def _read(path: str, subject: str, split: str) -> list[dict]:
    """Rows from the Parquet files that the Hub keeps of a data set, whatever script makes it on main."""
    file = f"{subject}/{split}/0000.parquet"
    if Path(path).is_dir():  # as `datasets` does: a copy below the working directory goes first
        return pd.read_parquet(Path(path) / file).to_dict("records")
    kept = hf_hub_download(path, file, repo_type="dataset", revision="refs/convert/parquet")
    return pd.read_parquet(kept).to_dict("records")


def first_100(docs):
    """At most 100 rows."""
    return docs.select(range(min(100, len(docs))))


def first_200(docs):
    """At most 200 rows."""
    return docs.select(range(min(200, len(docs))))


def summaries(docs):
    """At most 200 rows, with their `reference`."""
    return _referenced(docs, lambda row: " ".join(row["summary_sents"]))


def into_russian(docs):
    """At most 200 rows, with their `reference`."""
    return _referenced(docs, lambda row: row["inputs"]["ru"])


def into_english(docs):
    """At most 200 rows, with their `reference`."""
    return _referenced(docs, lambda row: row["inputs"]["en"])


def _referenced(docs, reference):
    docs = first_200(docs)
    return docs.add_column("reference", [reference(row) for row in docs])


class _Words:
    """Words of any script: rouge-score's own tokenizer drops all but a-z."""

    def tokenize(self, text: str) -> list[str]:
        """Words in lower case."""
        return re.findall(r"\w+", text.lower())


def rouge_l(doc: dict, results: list[str]) -> dict:
    """F-measure of the longest common subsequence of words (Lin 2004)."""
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return {"rougeL": scorer.score(doc["reference"], results[0])["rougeL"].fmeasure}
