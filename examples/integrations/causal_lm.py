"""
A causal language model without storing logits
==============================================

Next-token training of a causal language model with :class:`penex.LinearPENEX`. It replaces the last
layer of the model and the loss: the logits, one number for each token and each word of the
vocabulary, are never stored all at once. The model has random weights and the texts are synthetic,
so nothing is downloaded.
"""

# %%
# Texts: each word is followed by one of three others, mostly by the first of them. They differ in
# length and are padded at the end, as a tokenizer would.
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import penex

torch.manual_seed(0)
VOCABULARY, PAD, LONGEST = 1000, 0, 32
followers = torch.randint(1, VOCABULARY, (VOCABULARY, 3))
odds = torch.tensor([0.7, 0.2, 0.1])
starts = torch.randint(1, VOCABULARY, (40,))


def make_texts(number: int) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, (number, LONGEST)."""
    tokens = [starts[torch.randint(len(starts), (number,))]]
    for _ in range(LONGEST - 1):
        which = odds.multinomial(number, replacement=True)
        tokens.append(followers[tokens[-1], which])
    lengths = torch.randint(LONGEST // 2, LONGEST + 1, (number, 1))
    mask = torch.arange(LONGEST) < lengths
    return torch.stack(tokens, 1).where(mask, PAD), mask


# %%
# A small GPT-2, and a head that shares the weight of the model's own last layer (which GPT-2 shares
# with its embedding). The head has the arguments of :class:`penex.PENEX`, and its running penalty:
# save its state dict with that of the model, and switch both to evaluation mode.
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LONGEST,
        n_embd=64,
        n_layer=1,
        n_head=2,
        bos_token_id=PAD,
        eos_token_id=PAD,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
)
head = penex.LinearPENEX(64, VOCABULARY, bias=False, sensitivity=0.1)
head.weight = model.lm_head.weight


# %%
# The loss takes the hidden states from which the last layer would compute the logits. The state at
# a token predicts the next token, so the last state and the first label are dropped. Padding is
# ignored; on the CPU the head spends no time on it.
def next_token_loss(tokens: Tensor, mask: Tensor) -> Tensor:
    hidden = model.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state
    labels = tokens.masked_fill(~mask, -100)
    return head(hidden[:, :-1], labels[:, 1:])


# %%
# The probabilities that the model predicts, as a negative log-likelihood for each word. Only here
# are logits computed, and they are scaled by one plus the sensitivity.
@torch.no_grad()
def nll(tokens: Tensor, mask: Tensor) -> float:
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    labels = tokens.masked_fill(~mask, -100)[:, 1:]
    scaled = (1 + head.sensitivity) * logits
    return F.cross_entropy(scaled.flatten(0, 1), labels.flatten()).item()


test = make_texts(200)
untrained = nll(*test)

# %%
# Training. Gradients of PENEX are about the sensitivity times those of cross-entropy, which does
# not matter for Adam.
optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
model.train(), head.train()
for _ in range(150):
    loss = next_token_loss(*make_texts(64))
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
model.eval(), head.eval()

trained = nll(*test)
print(f"NLL of a word: {untrained:.2f} before, {trained:.2f} after, penalty {head.penalty:.2e}")
assert trained < untrained - 2

# %%
# The result equals the loss of the logits, up to rounding.
tokens, mask = test
with torch.no_grad():
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    labels = tokens.masked_fill(~mask, -100)[:, 1:]
    expected = penex.penex_loss(logits.transpose(1, 2), labels, penalty=head.penalty)
    torch.testing.assert_close(next_token_loss(tokens, mask), expected, rtol=1e-4, atol=0)

# %%
# The model generates as before. To sample from its probabilities, pass the factor as a temperature.
written = model.generate(
    starts[:5, None],
    attention_mask=torch.ones(5, 1),
    max_new_tokens=10,
    do_sample=True,
    temperature=1 / (1 + head.sensitivity),
    pad_token_id=PAD,
)
follows = (followers[written[:, :-1]] == written[:, 1:, None]).any(-1).float().mean()
print(f"{100 * follows:.0f} % of the words that it writes follow the rule")
assert follows > 0.5
