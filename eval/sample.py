"""`python -m eval sample`."""

from __future__ import annotations

from dataclasses import dataclass

from eval.model_choice import ModelChoice, open_model
from gpt2_ddp.data.tokenizer import tokenizer_of_model, vocabulary_of
from gpt2_ddp.evaluation.sampling import generate
from gpt2_ddp.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sample(ModelChoice):
    """Text that the model writes. The same seed gives the same text."""

    prompt: str = ""
    """What the text begins with; nothing is the start of a document."""
    count: int = 1
    """How many texts."""
    max_new_tokens: int = 100
    """Tokens after the prompt; a text that ends earlier is shorter."""
    temperature: float = 1.0
    """Below 1 likely tokens get likelier; 0 always takes the likeliest."""
    top_k: int | None = 50
    """Draw among the k likeliest tokens."""
    seed: int = 42
    """Decides the draws."""

    def run(self) -> None:
        """Print the texts, and write the JSON if asked to."""
        if self.count < 1:
            raise UserError(f"--count {self.count}: give 1 or more")
        with open_model(self) as opened:
            encoding = tokenizer_of_model(opened.path)
            eot = encoding.eot_token
            prompt = [eot, *encoding.encode_ordinary(self.prompt)]  # as documents begin in training
            if len(prompt) > opened.sequence_length:
                opened.warn(f"of the prompt's {len(prompt)} tokens only the last {opened.sequence_length} are read")
            rows = generate(
                opened.gpt,
                [prompt] * self.count,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                seed=self.seed,
                stop_at_eot=True,
                sequence_length=opened.sequence_length,
                autocast=opened.precision.autocast(),
                vocabulary=vocabulary_of(encoding),
            )
            texts = []
            for row in rows.tolist():
                end = row.index(eot, 1) if eot in row[1:] else len(row)
                texts.append(encoding.decode(row[1:end]))
            for number, text in enumerate(texts, start=1):
                opened.say(f"--- sample {number} of {self.count}\n{text}")
            opened.write_json(self.json, {"prompt": self.prompt, "samples": texts})
