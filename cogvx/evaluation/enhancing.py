"""task.enhancer: a language model writes short prompts out, as CogVideoX was trained on."""

from __future__ import annotations

from dataclasses import replace

import torch

from cogvx.errors import UserError
from cogvx.evaluation.wanted import Wanted
from cogvx.inference.chat import Chat, in_one_line, opened_chat
from cogvx.options.tasks import GenerateTask
from cogvx.progress import bar
from cogvx.training.peaks import give_memory_back


def enhanced(
    task: GenerateTask, wanted: list[Wanted], id_token: str | None, device: torch.device
) -> list[Wanted]:
    """The prompts as the model writes them; unchanged without task.enhancer.

    UserError if the model or the server is not there, or if it answers nothing.
    """
    if task.enhancer is None:
        return wanted
    found = written_by_model(task, wanted, id_token, device)
    # Nothing refers to the model any more. The text encoder gets its memory.
    give_memory_back(collect=True)
    for each in found:
        print(f"prompt  {each.asked!r} is written out as {each.prompt!r}", flush=True)
    return found


def written_by_model(
    task: GenerateTask, wanted: list[Wanted], id_token: str | None, device: torch.device
) -> list[Wanted]:
    chat = opened_chat(task.enhancer, task.enhancer_url, device, "task.enhancer")
    return [
        replace(each, prompt=written_out(task, each.prompt, id_token, chat), asked=each.prompt)
        for each in bar(wanted, desc="prompts", unit="prompt", leave=False)
    ]


def written_out(task: GenerateTask, prompt: str, id_token: str | None, chat: Chat) -> str:
    messages = [
        {"role": "system", "content": task.enhancer_instructions},
        {"role": "user", "content": prompt},
    ]
    [said] = chat([messages])
    answer = in_one_line(said.text)
    if not answer:
        raise UserError(
            f"task.enhancer={task.enhancer} answers nothing to {prompt!r}: take another model, or "
            f"task.enhancer=null"
        )
    # What was trained hangs on this word.
    lost = id_token is not None and id_token in prompt and id_token not in answer
    return f"{id_token} {answer}" if lost else answer
