"""AG News: which of four sections does a news article belong to?"""

from hftlight.data.sources.task import LabelTask

AGNEWS = LabelTask(
    name="agnews",
    licence="AG's corpus of news articles, for research and non-commercial use",
    max_new_tokens=200,
    hub="fancyzhx/ag_news",
    splits={"train": "train", "test": "test"},
    columns=("text", "label"),
    instruction="Categorize the news article given in the input into one of the 4 categories:\n\n"
    "World\nSports\nBusiness\nSci/Tech\n",
    spellings={
        "World": ("World", "world"),
        "Sports": ("Sports", "sports"),
        "Business": ("Business", "business"),
        "Sci/Tech": ("Sci/Tech", "sci"),
    },
)
