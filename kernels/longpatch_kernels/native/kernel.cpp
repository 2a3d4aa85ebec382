// Λ-attention on a CPU: one softmax over the far keys and the window, and its gradients. What Python calls.

#include "backward.h"
#include "decode.h"
#include "prefill.h"

extern "C" {
void prefill_float32(const Call* c) { prefill<float>(*c); }
void prefill_bfloat16(const Call* c) { prefill<BFloat16>(*c); }
void decode_float32(const Call* c) { decode<float>(*c); }
void decode_bfloat16(const Call* c) { decode<BFloat16>(*c); }
void backward_float32(const Call* c, const Gradients* g) { backward(*c, *g); }
}
