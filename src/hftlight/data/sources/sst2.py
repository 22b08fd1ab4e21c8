"""SST-2: is a sentence from a film review positive or negative?"""

from hftlight.data.sources.task import LabelTask

SST2 = LabelTask(
    name="sst2",
    licence="Stanford Sentiment Treebank, for research; no licence text",
    max_new_tokens=200,
    hub="stanfordnlp/sst2",
    splits={"train": "train", "test": "validation"},  # the labels of the hub's own test split are withheld
    columns=("sentence", "label"),
    instruction="Analyze the sentiment of the input, and respond only positive or negative",
    spellings={"negative": ("negative", "Negative"), "positive": ("positive", "Positive")},
)
