"""A completions server on loopback that says what a function says: `speak(prompt, body, number) -> text` for each completion asked for.

The texts end by themselves; their log-probabilities mean nothing.
"""

import contextlib

import json_server


class Scripted:
    """The requests that it has seen, by the text of their prompts."""

    def __init__(self, tokenizer, stop, speak):
        self.tokenizer, self.stop, self.speak = tokenizer, stop, speak
        self.requests, self.url = [], ""

    def answer(self, path, body, authorization):
        """Status and JSON of the answer to one POST."""
        if path != "/v1/completions":
            return 404, {"error": "no such path"}
        prompt = self.tokenizer.decode(body["prompt"])
        self.requests.append(prompt)
        return 200, {"choices": [self.choice(self.speak(prompt, body, j), j) for j in range(body["n"])]}

    def choice(self, text, index):
        """One completion, as in the protocol."""
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.stop]
        logprobs = {"token_logprobs": [-1.0] * len(ids)}
        return {"index": index, "text": text, "token_ids": ids, "finish_reason": "stop", "logprobs": logprobs}


@contextlib.contextmanager
def scripted(tokenizer, stop, speak):
    """While entered, the server answers at `.url`."""
    server = Scripted(tokenizer, stop, speak)
    with json_server.serving(server.answer) as url:
        server.url = f"{url.removesuffix('/v1')}/v1"
        yield server
