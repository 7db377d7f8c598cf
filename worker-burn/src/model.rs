//! A Llama-family decoder's layers in Burn.
//!
//! Shapes: b sequences of s tokens, n = b·s rows, d hidden size, h query and kv key-value heads of
//! width w, V vocabulary. Weights are `[out, in]`, as in Hugging Face's files; gains of norms are
//! `[1, d]`.

use burn_tensor::{Device, Int, Tensor, TensorData, activation};
use hgct_core::model::ModelSpec;

/// What a masked score is lowered by. Not infinity, which WGSL need not have.
const MASKED: f32 = -1e30;

/// Constants of a sequence length.
#[derive(Clone)]
pub(crate) struct Tables {
    /// `[1, s, 1, 1, w / 2]`
    cos: Tensor<5>,
    /// `[1, s, 1, 2, w / 2]`: minus for the first half, plus for the second.
    sin: Tensor<5>,
    /// `[1, 1, s · h / kv, s]`, 0 or [`MASKED`].
    mask: Tensor<4>,
}

impl Tables {
    /// Constants for sequences of `length` tokens, computed in f64.
    pub(crate) fn new(model: &ModelSpec, length: usize, device: &Device) -> Self {
        let frequencies = model.inverse_frequencies();
        let half = frequencies.len();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in 0..length {
            let angles = frequencies.iter().map(|frequency| position as f64 * frequency);
            cos.extend(angles.clone().map(|angle| angle.cos() as f32));
            sin.extend(angles.clone().map(|angle| -angle.sin() as f32));
            sin.extend(angles.map(|angle| angle.sin() as f32));
        }
        let sharing = (model.num_heads / model.num_kv_heads) as usize;
        let mut mask = vec![MASKED; sharing * length * length];
        for (at, row) in mask.chunks_exact_mut(length).enumerate() {
            row[..=at % length].fill(0.0);
        }
        Self {
            cos: Tensor::from_data(TensorData::new(cos, [1, length, 1, 1, half]), device),
            sin: Tensor::from_data(TensorData::new(sin, [1, length, 1, 2, half]), device),
            mask: Tensor::from_data(TensorData::new(mask, [1, 1, sharing * length, length]), device),
        }
    }
}

/// Rows of the embedding: `ids` `[n]` to `[n, d]`.
pub(crate) fn embedding(weight: Tensor<2>, ids: Tensor<1, Int>) -> Tensor<2> {
    weight.select(0, ids)
}

/// A decoder block over `x` `[n, d]`; `weights` in the order of [`ModelSpec::layer_tensors`].
pub(crate) fn block(model: &ModelSpec, weights: &[Tensor<2>], x: Tensor<2>, tables: &Tables) -> Tensor<2> {
    let [norm1, wq, wk, wv, wo, norm2, gate, up, down] = weights else { return x };
    let [n, _] = x.dims();
    let s = tables.cos.dims()[1];
    let (b, w) = (n / s, model.head_dim as usize);
    let (h, kv) = (model.num_heads as usize, model.num_kv_heads as usize);

    let y = rms_norm(model, x.clone(), norm1.clone());
    let q = rotate(linear(y.clone(), wq), tables, [b, s, h, w]).mul_scalar(1.0 / (w as f64).sqrt());
    let k = rotate(linear(y.clone(), wk), tables, [b, s, kv, w]);
    let v = linear(y, wv).reshape([b, s, kv, w]).swap_dims(1, 2);
    // Query heads that share a key-value head lie below each other: one product for all of them.
    let q = q.swap_dims(1, 2).reshape([b, kv, h / kv * s, w]);
    let scores = q.matmul(k.swap_dims(1, 2).swap_dims(2, 3)) + tables.mask.clone();
    let attended = activation::softmax(scores, 3).matmul(v);
    let attended = attended.reshape([b, h, s, w]).swap_dims(1, 2).reshape([n, h * w]);
    let x = x + linear(attended, wo);

    let y = rms_norm(model, x.clone(), norm2.clone());
    let gated = activation::silu(linear(y.clone(), gate)) * linear(y, up);
    x + linear(gated, down)
}

/// The head's logits `[n, V]`.
pub(crate) fn logits(model: &ModelSpec, weights: &[Tensor<2>], x: Tensor<2>) -> Tensor<2> {
    let [norm, weight] = weights else { return x };
    linear(rms_norm(model, x, norm.clone()), weight)
}

/// Sum over tokens of the cross-entropy in nats `[1]`; `labels` is `[n]`.
pub(crate) fn loss_sum(logits: Tensor<2>, labels: Tensor<1, Int>) -> Tensor<1> {
    let [n, _] = logits.dims();
    activation::log_softmax(logits, 1).gather(1, labels.reshape([n, 1])).sum().neg()
}

fn linear(x: Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    x.matmul(weight.clone().transpose())
}

/// RMS norm over rows (Zhang and Sennrich 2019, arXiv 1910.07467).
fn rms_norm(model: &ModelSpec, x: Tensor<2>, gain: Tensor<2>) -> Tensor<2> {
    let mean = x.clone().square().mean_dim(1);
    x * mean.add_scalar(model.rms_norm_eps).sqrt().recip() * gain
}

/// Turns pairs `(i, i + w / 2)` of every head (rotate-half form of arXiv 2104.09864): `[n, h · w]`
/// to `[b, s, h, w]`.
fn rotate(x: Tensor<2>, tables: &Tables, [b, s, h, w]: [usize; 4]) -> Tensor<4> {
    let x = x.reshape([b, s, h, 2, w / 2]);
    let turned = x.clone() * tables.cos.clone() + x.flip([3]) * tables.sin.clone();
    turned.reshape([b, s, h, w])
}
