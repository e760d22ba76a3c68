"""
How the peers do what bench.py measures, and what their loops share with ours. sft_transformers is the case sft done by
transformers; each function takes the case and returns step(), or, where the loop is a trainer's own, the seconds per step.

Every model is drawn at random (nothing is downloaded) without dropout, every optimizer is fused AdamW. Precisions: fp32; bf16,
which is autocast; "bf16 weights", parameters and all stored in bf16: faster still, but small updates are lost in rounding.
"""
import contextlib
import importlib.util
import os
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TRANSFORMERS_VERBOSITY="error")  # before their import


def random_ids(c, rows, n):
    """[rows, n] token ids; 0 and 1 are the peers' end of text and padding."""
    return torch.randint(2, c.vocab_size, (rows, n))


def training_step(model, optimizer, backward):
    """One optimizer step with gradient clipping, as sft.py, nanoGPT's train.py and transformers' Trainer all do it. backward()
    leaves the gradients in the parameters."""
    def step():
        optimizer.zero_grad(set_to_none=True)
        backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def autocast(c):
    return torch.autocast(c.device, torch.bfloat16) if c.precision == "bf16" else contextlib.nullcontext()


def gpt2(c, kind, **more):
    """A random transformers model of the case's shape; kind is GPT2LMHeadModel or GPT2ForSequenceClassification."""
    import transformers
    config = transformers.GPT2Config(
        n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, vocab_size=c.vocab_size,
        n_positions=max(c.n_positions, c.query + c.response), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        activation_function="gelu" if c.exact_gelu else "gelu_new",  # the latter is their default
        bos_token_id=0, eos_token_id=0, pad_token_id=1, **more)
    with torch.device(c.device):
        model = getattr(transformers, kind)(config)
    return model.to(torch.bfloat16) if c.precision == "bf16 weights" else model


def word_tokenizer(c):
    """What TRL's trainers ask for, though they get token ids: id 0 ends a text, id 1 pads."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    vocab = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, c.vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<eos>")), eos_token="<eos>",
                                   pad_token="<pad>", padding_side="left")


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's own attention

def attention_step(c, f):
    """Forward and backward of f(q, k, v) c.inner times: so many that the time to launch the kernels hides behind them. q, k, v
    are views of one fused projection, as in the model."""
    B, T, H, D = c.batch, c.query, c.n_head, c.n_embd // c.n_head
    qkv = torch.randn(B, T, 3, H, D, device=c.device, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    q, k, v = (x.detach().requires_grad_() for x in qkv)
    do = torch.randn(B, T, H, D, device=c.device, dtype=torch.bfloat16).transpose(1, 2)

    def step():
        for _ in range(c.inner):
            torch.autograd.grad(f(q, k, v), (q, k, v), do)
    return step


def attention_pytorch(c):
    """variant "FlashAttention": that backend and no other; "default": whichever PyTorch prefers here."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if c.variant == "FlashAttention" else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attention_step(c, sdpa)


# ---------------------------------------------------------------------------------------------------------------------
# transformers, and nanoGPT where one training step is compared

def sampling_transformers(c):
    from transformers import GenerationConfig
    model = gpt2(c, "GPT2LMHeadModel").eval()
    model.generation_config.eos_token_id = None  # nothing stops: every response has its full length
    config = GenerationConfig(max_new_tokens=c.response, do_sample=True, temperature=c.temperature, top_k=0, top_p=1.0,
                              pad_token_id=1, cache_implementation="static" if c.variant == "static cache" else None)
    queries = random_ids(c, c.batch, c.query).to(c.device)
    mask = torch.ones_like(queries)

    def step():
        with autocast(c):
            out = model.generate(input_ids=queries, attention_mask=mask, generation_config=config)
        assert out.shape == (c.batch, c.query + c.response)
    return step


def sft_transformers(c):
    model = gpt2(c, "GPT2LMHeadModel", attn_implementation=c.variant, use_cache=False).train()
    rows = random_ids(c, c.batch, c.query + c.response).to(c.device)

    def loss():
        with autocast(c):
            return model(input_ids=rows, labels=rows).loss
    return training_step(model, adamw(model), lambda: loss().backward())


def sft_nanogpt(c):
    spec = importlib.util.spec_from_file_location("nanogpt_model", os.path.join(c.nanogpt, "model.py"))
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.GPTConfig(block_size=max(c.n_positions, c.query + c.response), vocab_size=c.vocab_size, n_layer=c.n_layer,
                              n_head=c.n_head, n_embd=c.n_embd, dropout=0.0, bias=True)
    with torch.device(c.device):
        model = module.GPT(config)
    rows = random_ids(c, c.batch, c.query + c.response).to(c.device)
    inputs, targets = rows[:, :-1], rows[:, 1:].contiguous()

    def loss():
        with autocast(c):
            return model(inputs, targets)[1]
    return training_step(model, adamw(model), lambda: loss().backward())


def reward_transformers(c):
    """The loop one writes by hand: chosen and rejected rows in one forward."""
    model = gpt2(c, "GPT2ForSequenceClassification", num_labels=1, use_cache=False).train()
    queries = random_ids(c, c.batch, c.query)
    rows = torch.cat([torch.cat([queries, random_ids(c, c.batch, c.response)], 1) for _ in range(2)]).to(c.device)
    mask = torch.ones_like(rows)

    def loss():
        with autocast(c):
            chosen, rejected = model(input_ids=rows, attention_mask=mask).logits.squeeze(-1).float().chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()
    return training_step(model, adamw(model), lambda: loss().backward())


def logprobs_transformers(c):
    """variant "all logits": the vocabulary at every position and log_softmax, then the response's (as TRL's PPOTrainer does);
    "logits_to_keep": the vocabulary at response positions only."""
    model = gpt2(c, "GPT2LMHeadModel", use_cache=False).train()
    rows = random_ids(c, c.batch, c.query + c.response).to(c.device)
    response = rows[:, c.query:]

    def step():
        model.zero_grad(set_to_none=True)
        with autocast(c):
            if c.variant == "all logits":
                logits = model(input_ids=rows).logits[:, c.query - 1:-1].float() / c.temperature
                logprobs = logits.log_softmax(-1).gather(2, response[..., None])
            else:
                logits = model(input_ids=rows, logits_to_keep=c.response + 1).logits[:, :-1].float() / c.temperature
                logprobs = -F.cross_entropy(logits.flatten(0, 1), response.flatten(), reduction="none")
        logprobs.sum().backward()
    return step


# ---------------------------------------------------------------------------------------------------------------------
# TRL: its trainers own the loop, so a callback keeps the time

def stopwatch(laps):
    """-> callback, seconds: `seconds` grows by one entry per step; `laps` of them end the training."""
    from transformers import TrainerCallback
    seconds = []

    class Stopwatch(TrainerCallback):
        def on_train_begin(self, args, state, control, **more):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **more):
            now = time.perf_counter()
            seconds.append(now - self.began)
            self.began = now
            control.should_training_stop = len(seconds) >= laps

    return Stopwatch(), seconds


TRAINER = dict(report_to="none", save_strategy="no", eval_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
               gradient_checkpointing=False)  # on by default: slower, in less memory


def reward_trl(c):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer
    model = gpt2(c, "GPT2ForSequenceClassification", num_labels=1, use_cache=False)
    laps, callback, seconds = c.warmup + c.repeats, *stopwatch(c.warmup + c.repeats)
    queries = random_ids(c, laps * c.batch, c.query)
    chosen, rejected = (torch.cat([queries, random_ids(c, laps * c.batch, c.response)], 1).tolist() for _ in range(2))
    with tempfile.TemporaryDirectory() as scratch:
        config = RewardConfig(output_dir=scratch, per_device_train_batch_size=c.batch, max_steps=laps,
                              max_length=c.query + c.response, bf16=c.precision == "bf16", disable_dropout=True, **TRAINER)
        RewardTrainer(model=model, args=config, train_dataset=Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected}),
                      processing_class=word_tokenizer(c), callbacks=[callback]).train()
    return seconds


def ppo_trl(c):
    """PPOTrainer as its documentation sets it up, with the whole rollout in one forward wherever it can choose."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    policy, ref_policy = (gpt2(c, "GPT2LMHeadModel") for _ in range(2))
    ref_policy.load_state_dict(policy.state_dict())
    reward_model, value_model = (gpt2(c, "GPT2ForSequenceClassification", num_labels=1) for _ in range(2))
    laps, callback, seconds = c.warmup + c.repeats, *stopwatch(c.warmup + c.repeats)
    data = Dataset.from_dict({"input_ids": random_ids(c, c.batch * (laps + 1), c.query).tolist()})
    with tempfile.TemporaryDirectory() as scratch:
        config = PPOConfig(output_dir=scratch, per_device_train_batch_size=c.batch, gradient_accumulation_steps=1,
                           num_mini_batches=c.minibatches, num_ppo_epochs=c.epochs, total_episodes=c.batch * laps,
                           local_rollout_forward_batch_size=c.batch, response_length=c.response,
                           stop_token=None,  # nothing stops: every response has its full length
                           temperature=c.temperature, num_sample_generations=0, learning_rate=1e-5, bf16=False, **TRAINER)
        PPOTrainer(args=config, processing_class=word_tokenizer(c), model=policy, ref_model=ref_policy, reward_model=reward_model,
                   value_model=value_model, train_dataset=data, eval_dataset=data, callbacks=[callback]).train()
    return seconds
