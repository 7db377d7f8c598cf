//! Operators of a Llama-family decoder, forward and backward, over row-major f64 slices.
//!
//! Backward functions take the output's gradient, add to parameter gradients and answer with the
//! input's gradient.

/// `x · w`.
fn dot(x: &[f64], w: &[f64]) -> f64 {
    x.iter().zip(w).map(|(x, w)| x * w).sum()
}

/// `y += a x`.
fn add_scaled(a: f64, x: &[f64], y: &mut [f64]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// Sum of two equally long slices.
pub(super) fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// `y = x wᵀ`: `x` is `[n, width]`, `w` is `[outputs, width]`.
pub(super) fn linear(x: &[f64], w: &[f64], width: usize) -> Vec<f64> {
    x.chunks_exact(width).flat_map(|x| w.chunks_exact(width).map(move |w| dot(x, w))).collect()
}

/// Backward of [`linear`].
pub(super) fn linear_backward(x: &[f64], w: &[f64], width: usize, dy: &[f64], dw: &mut [f64]) -> Vec<f64> {
    let mut dx = vec![0.0; x.len()];
    let outputs = w.len() / width;
    for ((x, dx), dy) in x.chunks_exact(width).zip(dx.chunks_exact_mut(width)).zip(dy.chunks_exact(outputs)) {
        for ((w, dw), dy) in w.chunks_exact(width).zip(dw.chunks_exact_mut(width)).zip(dy) {
            add_scaled(*dy, w, dx);
            add_scaled(*dy, x, dw);
        }
    }
    dx
}

/// One over the root mean square of a row.
fn inverse_rms(row: &[f64], eps: f64) -> f64 {
    1.0 / (dot(row, row) / row.len() as f64 + eps).sqrt()
}

/// RMS norm over rows of `gain.len()` (Zhang and Sennrich 2019, arXiv 1910.07467).
pub(super) fn rms_norm(x: &[f64], gain: &[f64], eps: f64) -> Vec<f64> {
    x.chunks_exact(gain.len())
        .flat_map(|row| {
            let scale = inverse_rms(row, eps);
            row.iter().zip(gain).map(move |(x, gain)| x * scale * gain)
        })
        .collect()
}

/// Backward of [`rms_norm`].
pub(super) fn rms_norm_backward(
    x: &[f64],
    gain: &[f64],
    eps: f64,
    dy: &[f64],
    dgain: &mut [f64],
) -> Vec<f64> {
    let width = gain.len();
    let mut dx = Vec::with_capacity(x.len());
    for (row, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
        let scale = inverse_rms(row, eps);
        let scaled: Vec<f64> = dy.iter().zip(gain).map(|(dy, gain)| dy * gain).collect();
        let along = dot(&scaled, row) * scale.powi(3) / width as f64;
        dx.extend(scaled.iter().zip(row).map(|(d, x)| d * scale - x * along));
        for ((dgain, dy), x) in dgain.iter_mut().zip(dy).zip(row) {
            *dgain += dy * x * scale;
        }
    }
    dx
}

/// Turns pairs `(i, i + head_dim / 2)` of every head by position times frequency (rotate-half
/// form of arXiv 2104.09864); `x` is `[samples, seq_len, heads, head_dim]`. With `direction` −1 it
/// turns back, which is the backward.
pub(super) fn rotate(x: &mut [f64], seq_len: usize, heads: usize, frequencies: &[f64], direction: f64) {
    let half = frequencies.len();
    for (token, row) in x.chunks_exact_mut(heads * 2 * half).enumerate() {
        let position = (token % seq_len) as f64;
        for (i, frequency) in frequencies.iter().enumerate() {
            let (sin, cos) = (position * frequency).sin_cos();
            let sin = sin * direction;
            for head in row.chunks_exact_mut(2 * half) {
                let (a, b) = (head[i], head[i + half]);
                head[i] = a * cos - b * sin;
                head[i + half] = b * cos + a * sin;
            }
        }
    }
}

/// Sizes of grouped-query attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub(super) seq_len: usize,
    /// Query heads.
    pub(super) query: usize,
    /// Key and value heads.
    pub(super) kv: usize,
    pub(super) head_dim: usize,
}

impl Heads {
    /// Where head `head` of token `token` begins in a tensor of `heads` heads.
    fn at(&self, token: usize, head: usize, heads: usize) -> std::ops::Range<usize> {
        let begin = (token * heads + head) * self.head_dim;
        begin..begin + self.head_dim
    }

    /// Calls `f(query token, query head, first key token of the sample, key-value head)`.
    fn for_each_query(&self, tokens: usize, mut f: impl FnMut(usize, usize, usize, usize)) {
        let sharing = self.query / self.kv;
        for token in 0..tokens {
            let first = token - token % self.seq_len;
            for head in 0..self.query {
                f(token, head, first, head / sharing);
            }
        }
    }
}

/// Causal attention. `q` is `[samples, seq_len, query, head_dim]`, `k` and `v` have
/// `kv` heads. Answers with the output, shaped like `q`, and the weights
/// `[samples, seq_len, query, seq_len]`.
pub(super) fn attention(heads: Heads, q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let tokens = q.len() / (heads.query * heads.head_dim);
    let scale = 1.0 / (heads.head_dim as f64).sqrt();
    let mut out = vec![0.0; q.len()];
    let mut weights = vec![0.0; tokens * heads.query * heads.seq_len];
    heads.for_each_query(tokens, |token, head, first, kv| {
        let query = heads.at(token, head, heads.query);
        let scores: Vec<f64> = (first..=token)
            .map(|key| scale * dot(&q[query.clone()], &k[heads.at(key, kv, heads.kv)]))
            .collect();
        let row = (token * heads.query + head) * heads.seq_len;
        for (key, weight) in (first..=token).zip(softmax(&scores).0) {
            weights[row + key - first] = weight;
            add_scaled(weight, &v[heads.at(key, kv, heads.kv)], &mut out[query.clone()]);
        }
    });
    (out, weights)
}

/// Backward of [`attention`]: gradients of `q`, `k` and `v`.
pub(super) fn attention_backward(
    heads: Heads,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    weights: &[f64],
    dout: &[f64],
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let tokens = q.len() / (heads.query * heads.head_dim);
    let scale = 1.0 / (heads.head_dim as f64).sqrt();
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    heads.for_each_query(tokens, |token, head, first, kv| {
        let query = heads.at(token, head, heads.query);
        let dout = &dout[query.clone()];
        let row = (token * heads.query + head) * heads.seq_len;
        let weights = &weights[row..=row + token - first];
        let dweights: Vec<f64> =
            (first..=token).map(|key| dot(dout, &v[heads.at(key, kv, heads.kv)])).collect();
        let mean = dot(weights, &dweights);
        for ((key, weight), dweight) in (first..=token).zip(weights).zip(dweights) {
            let at = heads.at(key, kv, heads.kv);
            let dscore = scale * weight * (dweight - mean);
            add_scaled(*weight, dout, &mut dv[at.clone()]);
            add_scaled(dscore, &q[query.clone()], &mut dk[at.clone()]);
            add_scaled(dscore, &k[at], &mut dq[query.clone()]);
        }
    });
    (dq, dk, dv)
}

/// Softmax and the logarithm of its denominator.
fn softmax(scores: &[f64]) -> (Vec<f64>, f64) {
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = scores.iter().map(|x| (x - largest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    (powers.iter().map(|x| x / sum).collect(), largest + sum.ln())
}

/// `silu(gate) · up` (Shazeer 2020, arXiv 2002.05202).
pub(super) fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(gate, up)| gate * sigmoid(*gate) * up).collect()
}

/// Backward of [`swiglu`]: gradients of `gate` and `up`.
pub(super) fn swiglu_backward(gate: &[f64], up: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>) {
    gate.iter()
        .zip(up)
        .zip(dy)
        .map(|((gate, up), dy)| {
            let s = sigmoid(*gate);
            (dy * up * s * (1.0 + gate * (1.0 - s)), dy * gate * s)
        })
        .unzip()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Sum over tokens of the cross-entropy in nats, and its gradient with respect to the logits
/// `[tokens, vocab]`.
pub(super) fn cross_entropy_sum(logits: &[f64], labels: &[usize]) -> (f64, Vec<f64>) {
    let vocab = logits.len() / labels.len();
    let mut loss = 0.0;
    let mut dlogits = Vec::with_capacity(logits.len());
    for (row, label) in logits.chunks_exact(vocab).zip(labels) {
        let (mut probabilities, log_sum) = softmax(row);
        loss += log_sum - row[*label];
        probabilities[*label] -= 1.0;
        dlogits.extend(probabilities);
    }
    (loss, dlogits)
}
