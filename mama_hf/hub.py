"""A pruned model on the Hub: its files and its model card, in one commit."""

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .card import model_card
from .packed import save_packed


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    packed: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload pruned model",
    max_shard_size: int | str = "5GB",
    **card: Any,
) -> str:
    """
    Upload a masked, shrunk or packed model with a model card.

    `model.push_to_hub(repo_id)` uploads the same files but for the packed form, with an empty card.

    Args:
        packed (`bool`, *optional*, defaults to `False`): whether to upload the files of [`save_packed`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): uploaded with the model.
        private (`bool`, *optional*): of a new repository; `None`: the default of the account.
        token (`str`, *optional*): `None`: the one of `hf auth login`.
        card (`Any`): `base_model`, `license`, `dense`, `metrics` and `speed` of [`model_card`].

    Returns:
        `str`: the URL of the commit.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        if packed:
            save_packed(model, folder, max_shard_size=max_shard_size)
            card["packed_bytes"] = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        else:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        model_card(model, repo_id, tokenizer=tokenizer is not None, **card).save(Path(folder) / "README.md")
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message).commit_url
