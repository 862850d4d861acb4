"""Where a RULER prompt states its question: after the text, as RULER does, or before it.

A sparse prefill keeps the last tokens of a prompt dense. With the question at the end these tokens
ask the whole text; with the question in front they hold only the text's last words and a fixed
opening of the answer, so that every fact must be carried along by the sparse part.
"""

import re

from .samples import EvalError, Row

END, START = "end", "start"
QUESTIONS = (END, START)
ABOVE_TEXT = re.compile(r"above (list|coded text)")
CONTEXT, QUERY = "{context}", "{query}"
# The question's own words in the opening of an answer, and what stands there instead.
ASKED_AGAIN = {" for {query}": "", "the value {query}": "that value"}


def question_first(script: str, kind: Row) -> Row:
    """Return a generator's templates with the question in front of the text.

    The question is the last line of ``template``. It follows the instruction that precedes
    ``{context}``; what else stood behind the text is left out, and the opening of the answer
    (``answer_prefix``) loses the fields that repeat the question.

    Args:
        script: name of the generator script, for the error.
        kind: its entry in RULER's table: ``template``, ``answer_prefix`` and others.

    Raises:
        EvalError: if the template has no question line behind its text.
    """
    instruction, _, behind = kind["template"].partition(CONTEXT)
    question = behind.rpartition("\n")[2].strip()
    question = ABOVE_TEXT.sub(r"\1 below", question).replace("above", "below")
    opening = kind["answer_prefix"]
    for words, instead in ASKED_AGAIN.items():
        opening = opening.replace(words, instead)
    template = f"{instruction}{question}\n\n{CONTEXT}\n"
    if not question or CONTEXT in instruction or QUERY in opening:
        raise EvalError(f"the question of RULER's {script} cannot be moved in front of its text")
    return {**kind, "template": template, "answer_prefix": opening}
