"""
Token classification
====================

A tagger returns logits of shape (N, T, K), a class for each token. The criterion expects the
classes in dimension 1, as ``nn.CrossEntropyLoss`` does: transpose to (N, K, T), or flatten to (N·T,
K). Padding has the label −100, the default ``ignore_index``.
"""

# %%
# Synthetic sentences. The tag of a token depends on the token before it.
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import penex

torch.manual_seed(0)
WORDS, TAGS, PAD = 20, 4, 0


def make_sentences(number: int) -> tuple[Tensor, Tensor]:
    tokens = [torch.randint(1, WORDS, (int(n),)) for n in torch.randint(4, 13, (number,))]
    tags = [(s + 2 * s.roll(1).index_fill(0, torch.tensor([0]), 0)) % TAGS for s in tokens]
    return (
        pad_sequence(tokens, batch_first=True, padding_value=PAD),
        pad_sequence(tags, batch_first=True, padding_value=-100),
    )


tokens, tags = make_sentences(400)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16, padding_idx=PAD)
        self.recurrent = nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, TAGS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(tokens))[0])  # (N, T, K)


# %%
# Transposed or flattened, the loss is the same: the mean over the tokens that are not padding.
model = Tagger()
logits = model(tokens)
transposed = penex.PENEX()(logits.transpose(1, 2), tags)
flattened = penex.PENEX()(logits.flatten(0, 1), tags.flatten())
real = tags != -100
picked = penex.PENEX()(logits[real], tags[real])
torch.testing.assert_close(transposed, flattened)
torch.testing.assert_close(transposed, picked)

# %%
# Training.
criterion = penex.PENEX()
optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(30):
    for rows in torch.randperm(len(tokens)).split(50):
        loss = criterion(model(tokens[rows]).transpose(1, 2), tags[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

# %%
# For logits (N, T, K) the class dimension is the last one, so pass it to ``predict_proba``.
model.eval()
criterion.eval()
new_tokens, new_tags = make_sentences(200)
with torch.no_grad():
    probabilities = criterion.predict_proba(model(new_tokens), dim=-1)
real = new_tags != -100
accuracy = (probabilities.argmax(-1) == new_tags)[real].float().mean().item()
torch.testing.assert_close(probabilities.sum(-1), torch.ones(new_tokens.shape))
assert accuracy > 0.9
print(f"accuracy on {int(real.sum())} tokens {accuracy:.3f}")
