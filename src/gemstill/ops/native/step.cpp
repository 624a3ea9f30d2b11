// The next tokens of a few texts in one call: embedding, layers, head; ops of model/step.py.

#include <memory>
#include <utility>

#include "step_network.h"

namespace gemstill {

// x = the scaled embedding; the angles of all positions.
void Step::begin(const Member& me) {
  const int64_t D = net_.D, half = net_.d / 2;
  each(me, rows_.n, [&](int64_t m) {
    float* x = x_.data() + m * D;
    row_of(net_.embedding, rows_.tokens[m], x);
    for (int64_t j = 0; j < D; j++) x[j] *= float(net_.embedding_scale);
    for (int64_t i = 0; i < 2 * half; i++) {
      const float angle = float(rows_.positions[m]) * net_.frequencies[i];
      float* turn = turns_.data() + (2 * m + i / half) * net_.d + i % half;
      turn[0] = std::cos(angle);
      turn[half] = std::sin(angle);
    }
    enter(net_.layers[0], m);
  });
}

// What a layer's first products take of token m.
void Step::enter(const Layer& layer, int64_t m) {
  norm<false>(x_.data() + m * net_.D, layer.input, net_.D, net_.eps, normed_.data() + m * net_.D);
  attention_in_.take(normed_.data(), m);
}

// joint = queries, keys and values; all in their places.
template <class T>
void Step::project(const Member& me, const Layer& layer) {
  const int64_t heads = net_.H + 2 * net_.G, width = heads * net_.d;
  const int64_t first = team_.first_of(me.first, int64_t(plans_[layer.local].parts.size()) * net_.G);
  each_rows(
      me, {&layer.q, &layer.k, &layer.v}, reinterpret_cast<const uint8_t*>(first_key<T>(layer, first)),
      [&](const Matrix& matrix, int64_t begin, int64_t end, const Ahead& ahead) {
        const int64_t before = &matrix == &layer.q ? 0 : &matrix == &layer.k ? layer.q.N : layer.q.N + layer.k.N;
        multiply(matrix, attention_in_(matrix), begin, end, joint_.data() + before + begin, width, ahead);
      },
      [&](int64_t m) { for (int64_t head = 0; head < heads; head++) place_head<T>(layer, m, head); });
}

// Normalises and turns one head of token m, of queries, keys or values; keys and values go where they are kept.
template <class T>
void Step::place_head(const Layer& layer, int64_t m, int64_t head) {
  const int64_t d = net_.d, half = d / 2, H = net_.H, G = net_.G;
  float* x = joint_.data() + (m * (H + 2 * G) + head) * d;
  const bool query = head < H, value = head >= H + G;
  if (net_.qk_norm && !value) norm<false>(x, query ? layer.q_norm : layer.k_norm, d, net_.eps, x);
  if (!value) {
    const float* turn = turns_.data() + (2 * m + layer.local) * d;
    const float scale = query ? float(net_.query_scale) : 1.0f;
    for (int64_t i = 0; i < half; i++) {
      const float a = x[i], b = x[half + i];
      x[i] = (a * turn[i] - b * turn[half + i]) * scale;
      x[half + i] = (b * turn[i] + a * turn[half + i]) * scale;
    }
  }
  if (query) {
    return order<T>(x, d, queries_.data() + (m * H + head) * d);
  }
  const int64_t group = (head - H) % G, index = rows_.positions[m] % layer.size;
  const int64_t at = (rows_.slots[m] * G + group) * layer.size + index;
  keep(x, d, static_cast<T*>(value ? layer.values : layer.keys) + at * d,
       scales_at<T>(value ? layer.value_scales : layer.key_scales, at * blocks_of(d)));
}

// x += norm(o(attention)); what the feed-forward layer takes of that.
template <class T>
void Step::attend_to_all(const Member& me, const Layer& layer) {
  const int64_t D = net_.D, H = net_.H, G = net_.G, d = net_.d, R = H / G;
  const Plan& plan = plans_[layer.local];
  const T* output = reinterpret_cast<const T*>(first_of(me, {&layer.o}));
  const auto attend = [&](int64_t i, const T* following) {
    const Part& part = plan.parts[i / G];
    const int64_t at = i / G * H + i % G * R;
    attend_all<T>(R, queries_.data() + (part.m * H + i % G * R) * d, ring_of<T>(layer, i, false),
                  ring_of<T>(layer, i, true), part.start, part.count, net_.softcap, following, partials_.data() + at,
                  parts_.data() + at * d);
  };
  const auto put_together = [&](int64_t m) {
    for (int64_t h = 0; h < H; h++) {
      const int64_t at = plan.firsts[m] * H + h;
      combine<T>(partials_.data() + at, parts_.data() + at * d, H, plan.firsts[m + 1] - plan.firsts[m], d,
                 queries_.data() + (m * H + h) * d, attended_.data() + (m * H + h) * d);
    }
    attention_out_.take(attended_.data(), m);
  };
  each_part(
      me, int64_t(plan.parts.size()) * G, 1, output,
      [&](int64_t begin, int64_t end, int64_t stop) {
        for (int64_t i = begin; i < end; i++) attend(i, i + 1 < stop ? first_key<T>(layer, i + 1) : output);
      },
      put_together);
  each_rows(
      me, {&layer.o}, first_of(me, {&layer.gate}),
      [&](const Matrix& o, int64_t begin, int64_t end, const Ahead& ahead) {
        multiply(o, attention_out_(o), begin, end, out_.data() + begin, D, ahead);
      },
      [&](int64_t m) {
        float* x = x_.data() + m * D;
        norm<true>(out_.data() + m * D, layer.post_attention, D, net_.eps, x);
        norm<false>(x, layer.pre_feedforward, D, net_.eps, normed_.data() + m * D);
        feed_forward_in_.take(normed_.data(), m);
      });
}

// x += norm(down(gelu(gate) up)); what the next layer takes of that.
void Step::feed_forward(const Member& me, size_t number) {
  const int64_t n = rows_.n, D = net_.D, I = net_.I;
  const Layer& layer = net_.layers[number];
  const Layer* next = number + 1 < net_.layers.size() ? &net_.layers[number + 1] : nullptr;
  each_rows(
      me, {&layer.gate}, first_of(me, {&layer.down}),
      [&](const Matrix& gate, int64_t begin, int64_t end, const Ahead& ahead) {
        // Now these rows of one matrix, now of the other.
        const uint8_t* next = end < std::min(ahead.stop, gate.N) ? weights_from(gate, end) : ahead.next;
        const uint8_t* other = weights_from(layer.up, begin);
        multiply(gate, feed_forward_in_(gate), begin, end, gate_.data() + begin, I, {end, other});
        multiply(layer.up, feed_forward_in_(layer.up), begin, end, hidden_.data() + begin, I, {end, next});
        for (int64_t m = 0; m < n; m++) {
          const float* x = gate_.data() + m * I;
          float* y = hidden_.data() + m * I;
#pragma omp simd
          for (int64_t j = begin; j < end; j++) y[j] *= x[j] * sigmoid_of<true>(x[j]);
        }
      },
      [&](int64_t m) { feed_forward_out_.take(hidden_.data(), m); });
  each_rows(
      me, {&layer.down}, first_of(me, next ? Matrices{&next->q, &next->k, &next->v} : Matrices{&net_.head}),
      [&](const Matrix& down, int64_t begin, int64_t end, const Ahead& ahead) {
        multiply(down, feed_forward_out_(down), begin, end, out_.data() + begin, D, ahead);
      },
      [&](int64_t m) {
        norm<true>(out_.data() + m * D, layer.post_feedforward, D, net_.eps, x_.data() + m * D);
        if (next) enter(*next, m);
      });
}

// The logits of the tokens that were asked for.
void Step::end(const Member& me) {
  const int64_t count = int64_t(rows_.wanted.size()), D = net_.D, V = net_.V;
  if (count == 0) return;
  each(me, count, [&](int64_t i) {
    norm<false>(x_.data() + rows_.wanted[i] * D, net_.norm, D, net_.eps, normed_.data() + i * D);
    head_in_.take(normed_.data(), i);
  });
  const Cap cap(net_.final_softcap);
  const auto logits = [&](const Matrix& head, int64_t begin, int64_t end, const Ahead& ahead) {
    multiply(head, head_in_(head), begin, end, logits_ + begin, V, ahead);
    if (net_.final_softcap <= 0) return;
    for (int64_t i = 0; i < count; i++) {
      float* row = logits_ + i * V;
      float slope;
#pragma omp simd private(slope)
      for (int64_t j = begin; j < end; j++) row[j] = value<true, true>(row[j], cap, slope);
    }
  };
  each_rows(me, {&net_.head}, nullptr, logits, [](int64_t) {});
}

}  // namespace gemstill

namespace {

using namespace gemstill;

// A network as it was read from tensors. The weights are kept, and those that are no packed matrices may be given other
// memory; the cache's are not, so that they can be freed.
struct Prepared {
  std::vector<Tensor> weights;
  Tensor frequencies;
  int64_t slots;
  Network network;
  std::vector<std::pair<size_t, Matrix*>> plain;  // the numbers of their tensors
  bool tied;

  // False where one of them cannot be read in its place.
  bool look() {
    for (const auto& [number, to] : plain) {
      const Tensor& x = weights[number];
      const bool wide = x.scalar_type() == ScalarType::Float, narrow = x.scalar_type() == ScalarType::BFloat16;
      if (!(wide || narrow) || !x.is_cpu() || !x.is_contiguous() || x.numel() != to->N * to->K) return false;
      to->kind = wide ? Kind::float32 : Kind::bfloat16;
      to->data = pointer<uint8_t>(x);
    }
    if (tied) network.head = network.embedding;
    return true;
  }
};

// weights: in the order of model/step.py; kinds: below 0 for a tensor of floats. shape: D, I, H, G, d, V, layers, and
// whether there are qk norms and a head of its own. constants: eps, the scales of embedding and queries, soft caps or 0
// of attention and logits. cache: keys and values [slots, G, size, d] of each layer, of int8 their scales, too; windows:
// of each layer, 0 for a global one. Gives a Prepared in a tensor of bytes.
Tensor step_network(std::vector<Tensor> weights, std::vector<int64_t> kinds, std::vector<Tensor> cache,
                    std::vector<int64_t> windows, Tensor frequencies, std::vector<int64_t> shape,
                    std::vector<double> constants) {
  auto made = std::make_unique<Prepared>(Prepared{std::move(weights), frequencies, cache[0].size(0)});
  Network& N = made->network;
  N.D = shape[0], N.I = shape[1], N.H = shape[2], N.G = shape[3], N.d = shape[4], N.V = shape[5];
  const int64_t layers = shape[6], D = N.D, heads = N.H * N.d, groups = N.G * N.d;
  N.qk_norm = shape[7];
  N.cache = cache[0].scalar_type();
  const int64_t tensors = N.cache == ScalarType::Char ? 4 : 2;  // of a layer
  N.eps = constants[0];
  N.embedding_scale = constants[1];
  N.query_scale = constants[2];
  N.softcap = constants[3];
  N.final_softcap = constants[4];
  N.frequencies = pointer<float>(frequencies);
  size_t at = 0;
  const auto read = [&](Matrix& to, int64_t rows, int64_t columns) {
    to = {Kind::float32, nullptr, rows, columns};
    if (kinds[at] < 0) {
      made->plain.push_back({at, &to});
    } else {
      STD_TORCH_CHECK(rows > 1, "a packed gain");
      to.kind = Kind(kinds[at]);
      to.data = pointer<uint8_t>(made->weights[at]);
    }
    at++;
  };
  read(N.embedding, N.V, D);
  N.layers.resize(layers);
  for (int64_t i = 0; i < layers; i++) {
    Layer& layer = N.layers[i];
    read(layer.input, 1, D);
    read(layer.q, heads, D);
    read(layer.k, groups, D);
    read(layer.v, groups, D);
    if (N.qk_norm) {
      read(layer.q_norm, 1, N.d);
      read(layer.k_norm, 1, N.d);
    }
    read(layer.o, D, heads);
    read(layer.post_attention, 1, D);
    read(layer.pre_feedforward, 1, D);
    read(layer.gate, N.I, D);
    read(layer.up, N.I, D);
    read(layer.down, D, N.I);
    read(layer.post_feedforward, 1, D);
    const Tensor* kept = &cache[tensors * i];
    layer.keys = kept[0].data_ptr();
    layer.values = kept[1].data_ptr();
    if (tensors == 4) {
      layer.key_scales = pointer<float>(kept[2]);
      layer.value_scales = pointer<float>(kept[3]);
    }
    layer.size = kept[0].size(2);
    layer.local = windows[i] > 0;
    layer.window = layer.local ? windows[i] : layer.size;
  }
  read(N.norm, 1, D);
  made->tied = !shape[8];
  if (made->tied) {
    N.head = N.embedding;
  } else {
    read(N.head, N.V, D);
  }
  const int64_t size[] = {sizeof(Prepared)}, stride[] = {1};
  return torch::stable::from_blob(made.release(), {size, 1}, {stride, 1}, frequencies.device(), ScalarType::Byte,
                                  [](void* x) { delete static_cast<Prepared*>(x); });
}

// The next tokens of a few texts, each with its slot and position; what bfloat16 weights are multiplied with may be
// rounded to bfloat16 from token `exact` on. logits: [wanted, V] float. False, and nothing is done, where a weight cannot
// be read in its place.
bool step(Tensor network, std::vector<int64_t> tokens, std::vector<int64_t> slots, std::vector<int64_t> positions,
          std::vector<int64_t> wanted, int64_t exact, Tensor logits) {
  Prepared& prepared = *static_cast<Prepared*>(network.data_ptr());
  if (!prepared.look()) return false;
  const int64_t n = int64_t(tokens.size());
  for (int64_t m = 0; m < n; m++) {
    STD_TORCH_CHECK(tokens[m] >= 0 && tokens[m] < prepared.network.V, "a token outside the vocabulary");
    STD_TORCH_CHECK(slots[m] >= 0 && slots[m] < prepared.slots, "no such slot");
  }
  const Rows these{n, std::min(exact, n), tokens.data(), slots.data(), positions.data(), wanted};
  const int64_t threads = torch::stable::get_num_threads();
  Step job(prepared.network, these, pointer<float>(logits), threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) { job.run({begin, end}); });
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gemstill, m) {
  m.def("step_network(Tensor[] weights, int[] kinds, Tensor[] cache, int[] windows, Tensor frequencies, int[] shape, "
        "float[] constants) -> Tensor");
  m.def("step(Tensor network, int[] tokens, int[] slots, int[] positions, int[] wanted, int exact, Tensor(a!) logits) "
        "-> bool");
}

STABLE_TORCH_LIBRARY_IMPL(gemstill, CPU, m) {
  m.impl("step_network", TORCH_BOX(&step_network));
  m.impl("step", TORCH_BOX(&step));
}
