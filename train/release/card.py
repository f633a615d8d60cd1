"""The model card of weights that ship: texts that a person wrote, with numbers that the export measured."""

TEXTS = {  # what the YAML file must say, and what is meant
    "title": "what the model does, in a few words",
    "summary": "what it was trained to find, in a sentence or two",
    "data": "what it was trained on: name, source, how many pictures, how they were split",
    "split": "what the scores are measured on, such as: the 60 validation pictures",
    "licence": "of the data and of the weights",
    "recipe": "how it was trained: stages, hardware, hours",
    "command": "the command or commands, without paths of a machine",
    "limits": "what it does badly, and what it should not be used for",
}
SECTIONS = ("Use", "Data", "Licence", "Recipe", "Scores", "Limits", "File")


def write_card(name: str, facts: dict, checksum: str, size: int) -> str:
    """Write a card.

    Parameters
    ----------
    name : str
        Of the weights.
    facts : dict
        The file's header, as ``train.export`` writes it.
    checksum : str
        SHA-256 of the file, in hexadecimal.
    size : int
        Bytes of the file.

    Returns
    -------
    str
        Markdown with a heading for each of SECTIONS.
    """
    about, classes = facts["about"], facts["classes"]
    head = f" with a {facts['head']} head" if "head" in facts else ""
    make = "create_segmenter" if facts["kind"] == "segmenter" else "create_model"
    mean, std = (", ".join(map(str, facts["input"][key])) for key in ("mean", "std"))
    return f"""# {name}: {about["title"]}

{about["summary"]}

## Use

    model = fast.{make}(pretrained="{name}").eval()
    python -m train.predict PICTURE --pretrained {name}

Pictures are RGB, 0 to 1, normalised with mean {mean} and standard deviation {std} (raw uint8 is normalised by the
model itself), at least {facts["input"]["smallest_side"]} pixels a side.
Classes ({len(classes)}): {", ".join(classes)}.

## Data

{about["data"]}

## Licence

{about["licence"]}

## Recipe

{about["recipe"]}

{indented(about["command"])}

Exported at commit {facts["commit"] or "unknown"}.

## Scores

Measured on {about["split"]}, in percent:

{score_table(facts)}

{describe_samples(facts["samples"])}

## Limits

{about["limits"]}

## File

| | |
|---|---|
| file | `{name}.safetensors`, {size:,} bytes |
| SHA-256 | `{checksum}` |
| model | {facts["model"]}{head}, {facts["parameters"]:,} parameters |
| numbers | {facts["precision"]} (vectors float32), read as float32 |
"""


def score_table(facts: dict) -> str:
    """Write the scores of the file, and beside them those that the run measured itself, where they are known."""
    here, there = facts["scores"], facts["trained_scores"]
    head = "| score | this file |" + (f" in training, step {there['step']:,} |" if there else "")
    rows = [f"| {key} | {shown(here[key])} |" + (f" {shown(there.get(key))} |" if there else "") for key in here]
    return "\n".join([head, "|---|---|" + ("---|" if there else ""), *rows])


def describe_samples(samples: dict) -> str:
    """Describe which pictures a test repeats, and with which result."""
    if not samples["pictures"]:
        return "No sample picture is kept: nothing repeats these scores without the data."
    scores = ", ".join(f"{key} {shown(value)}" for key, value in samples["scores"].items() if isinstance(value, float))
    return f"On {samples['what']}, which a test repeats: {scores}."


def shown(value: float | int | None) -> str:
    """Write a score with two places, a count as it is, a dash for none."""
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def indented(text: str) -> str:
    """Set lines as code."""
    return "\n".join(f"    {line}" for line in text.splitlines())
