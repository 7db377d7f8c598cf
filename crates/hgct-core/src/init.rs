//! Initial parameters from (seed, tensor name, element index), the same on every machine.
//!
//! Matrices are normal with the model's `initializer_range`; norms are one. Each element is a
//! function of its own index, so any owner can make any row range alone.

use crate::canonical::Hash;
use crate::model::{ModelSpec, TensorSpec};

/// Fills `out` with elements `first..first + out.len()` (row-major) of `tensor`.
pub fn fill(model: &ModelSpec, seed: u64, tensor: &TensorSpec, first: u64, out: &mut [f32]) {
    if !tensor.decays() {
        out.fill(1.0);
        return;
    }
    let key = tensor_key(seed, &tensor.name);
    for (element, index) in out.iter_mut().zip(first..) {
        *element = (model.initializer_range * normal(key, index)) as f32;
    }
}

/// A uniform in (0, 1], a function of seed and counter alone.
pub fn uniform_at(seed: u64, counter: u64) -> f64 {
    uniform(mix(seed, counter))
}

/// A 64-bit key of (seed, name).
fn tensor_key(seed: u64, name: &str) -> u64 {
    let digest = Hash::of_bytes(format!("hgct-init-1/{seed}/{name}").as_bytes());
    u64::from_str_radix(&digest.as_str()[..16], 16).unwrap_or_default()
}

/// Standard normal by Box–Muller over two counter-based uniforms; even and odd indices share a
/// pair and take its cosine and sine.
fn normal(key: u64, index: u64) -> f64 {
    let pair = index / 2;
    let u1 = uniform(mix(key, 2 * pair));
    let u2 = uniform(mix(key, 2 * pair + 1));
    let radius = (-2.0 * u1.ln()).sqrt();
    let angle = std::f64::consts::TAU * u2;
    radius * if index.is_multiple_of(2) { angle.cos() } else { angle.sin() }
}

/// A uniform in (0, 1] from 53 random bits.
fn uniform(bits: u64) -> f64 {
    ((bits >> 11) + 1) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// SplitMix64's finalizer (Steele et al. 2014) over a keyed counter.
pub(crate) fn mix(key: u64, counter: u64) -> u64 {
    let mut z = key ^ counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> ModelSpec {
        ModelSpec::from_config_json(
            "config.json",
            r#"{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}"#,
        )
        .unwrap()
    }

    #[test]
    fn any_range_is_the_same_as_the_whole() {
        let model = model();
        let tensor = &model.tensors()[0];
        let mut whole = vec![0f32; tensor.num_elements() as usize];
        fill(&model, 7, tensor, 0, &mut whole);
        let mut part = vec![0f32; 1001];
        fill(&model, 7, tensor, 333, &mut part);
        assert_eq!(part, whole[333..1334]);
    }

    #[test]
    fn weights_have_the_stated_mean_and_deviation_and_differ_by_seed_and_name() {
        let model = model();
        let tensors = model.tensors();
        let mut a = vec![0f32; 32_768];
        fill(&model, 7, &tensors[0], 0, &mut a);
        let mean = a.iter().map(|x| f64::from(*x)).sum::<f64>() / a.len() as f64;
        let deviation = (a.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / a.len() as f64).sqrt();
        assert!(mean.abs() < 3.0 * 0.02 / (a.len() as f64).sqrt(), "{mean}");
        assert!((deviation / 0.02 - 1.0).abs() < 0.02, "{deviation}");
        let mut b = vec![0f32; 32_768];
        fill(&model, 8, &tensors[0], 0, &mut b);
        assert_ne!(a, b);
        fill(&model, 7, &TensorSpec { name: "other.weight".into(), ..tensors[0].clone() }, 0, &mut b);
        assert_ne!(a, b);
    }
}
