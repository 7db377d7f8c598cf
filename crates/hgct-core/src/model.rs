//! A Llama-family architecture, read from a Hugging Face `config.json`.
//!
//! The planner's unit is the *layer*: layer 0 is the embedding, layers `1..=num_layers` are the
//! decoder blocks, layer `num_layers + 1` is the head (final norm and `lm_head`). Tensor names are
//! those of `LlamaForCausalLM`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::suggest::nearest;
use crate::{Error, Result};

/// Name of the token embedding, which tied models use in the head too.
pub const EMBEDDING: &str = "model.embed_tokens.weight";

/// Largest width or vocabulary.
const MAX_COUNT: u32 = 1 << 24;
/// Most decoder blocks, so that a damaged file cannot ask for endless tables.
const MAX_LAYERS: u32 = 1 << 14;
/// Most heads, and widest head; their product stays inside 32 bits.
const MAX_HEADS: u32 = 1 << 15;

/// How the rotary frequencies are scaled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum RopeScaling {
    /// Frequencies as in the RoFormer paper (arXiv 2104.09864).
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// Divisor of the frequencies.
        factor: f64,
    },
    /// Llama 3.1's smooth interpolation between scaled low and unscaled high frequencies.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths longer than `original_max_position / low_freq_factor` are scaled fully.
        low_freq_factor: f64,
        /// Wavelengths shorter than `original_max_position / high_freq_factor` are not scaled.
        high_freq_factor: f64,
        /// Context length before the extension.
        original_max_position: u64,
    },
}

/// A model's shape. Field names follow the glossary, not `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// Rows of the embedding.
    pub vocab_size: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Width inside the MLP.
    pub intermediate_size: u32,
    /// Decoder blocks.
    pub num_layers: u32,
    /// Query heads.
    pub num_heads: u32,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: u32,
    /// Width of a head; even.
    pub head_dim: u32,
    /// Epsilon inside the square root of every RMS norm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Whether the head uses the embedding's tensor.
    pub tie_embeddings: bool,
    /// Longest sequence the model was made for.
    pub max_position: u32,
    /// Standard deviation of initial weights.
    pub initializer_range: f64,
}

/// One named tensor of the model.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TensorSpec {
    /// Hugging Face name.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
}

impl TensorSpec {
    /// Elements in all.
    pub fn num_elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Size of dimension 0.
    pub fn rows(&self) -> u64 {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Elements of one row of dimension 0.
    pub fn row_elements(&self) -> u64 {
        self.shape.iter().skip(1).product()
    }

    /// Whether weight decay applies: matrices yes; norms and biases (one dimension) no.
    pub fn decays(&self) -> bool {
        self.shape.len() > 1
    }
}

/// What a layer of the model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerKind {
    /// Token embedding.
    Embedding,
    /// Decoder block.
    Block,
    /// Final norm, `lm_head` and loss.
    Head,
}

impl ModelSpec {
    /// Reads a `config.json`; `file` is only named in errors.
    pub fn from_config_json(file: &str, text: &str) -> Result<Self> {
        let value: Value = crate::canonical::decode(file, text)?;
        let Value::Object(map) = value else {
            return Err(Error::Syntax {
                file: file.into(),
                line: None,
                message: "must be a JSON object".into(),
            });
        };
        Config { file, map: &map, path: "" }.model()
    }

    /// The `config.json` that `transformers` reads for this model.
    pub fn to_config_json(&self) -> String {
        let mut config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_embeddings,
            "torch_dtype": "float32",
            "vocab_size": self.vocab_size,
        });
        match &self.rope_scaling {
            RopeScaling::Default => {}
            RopeScaling::Linear { factor } => {
                config["rope_scaling"] = serde_json::json!({"rope_type": "linear", "factor": factor});
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                config["rope_scaling"] = serde_json::json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_max_position,
                });
            }
        }
        crate::canonical::encode(&config)
    }

    /// Checks the bounds that a `config.json` is read with, for a model that came another way;
    /// `file` is only named in errors.
    pub fn validate(&self, file: &str) -> Result<()> {
        let bad = |key: &str, found: String, allowed: String| {
            Err(Error::Value { file: file.into(), key: format!("model.{key}"), found, allowed })
        };
        for (key, value, most) in [
            ("vocab_size", self.vocab_size, MAX_COUNT),
            ("hidden_size", self.hidden_size, MAX_COUNT),
            ("intermediate_size", self.intermediate_size, MAX_COUNT),
            ("num_layers", self.num_layers, MAX_LAYERS),
            ("num_heads", self.num_heads, MAX_HEADS),
            ("num_kv_heads", self.num_kv_heads, MAX_HEADS),
            ("head_dim", self.head_dim, MAX_HEADS),
            ("max_position", self.max_position, MAX_COUNT),
        ] {
            if !(1..=most).contains(&value) {
                return bad(key, value.to_string(), format!("a whole number from 1 to {most}"));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return bad(
                "num_kv_heads",
                self.num_kv_heads.to_string(),
                format!("a divisor of num_heads = {}", self.num_heads),
            );
        }
        if !self.head_dim.is_multiple_of(2) {
            return bad("head_dim", self.head_dim.to_string(), "even (rotary embedding turns pairs)".into());
        }
        Ok(())
    }

    /// Layers the planner places: embedding, blocks, head.
    pub fn num_placeable_layers(&self) -> u32 {
        self.num_layers + 2
    }

    /// Index of the head's layer.
    pub fn head_layer(&self) -> u32 {
        self.num_layers + 1
    }

    /// What layer `layer` is.
    pub fn layer_kind(&self, layer: u32) -> LayerKind {
        match layer {
            0 => LayerKind::Embedding,
            layer if layer == self.head_layer() => LayerKind::Head,
            _ => LayerKind::Block,
        }
    }

    /// The tensors that layer `layer` uses, in a fixed order. A tied embedding stands in layer 0
    /// and in the head.
    pub fn layer_tensors(&self, layer: u32) -> Vec<TensorSpec> {
        let (h, f, v) =
            (u64::from(self.hidden_size), u64::from(self.intermediate_size), u64::from(self.vocab_size));
        let q = u64::from(self.num_heads * self.head_dim);
        let kv = u64::from(self.num_kv_heads * self.head_dim);
        let tensor = |name: String, shape: &[u64]| TensorSpec { name, shape: shape.to_vec() };
        match self.layer_kind(layer) {
            LayerKind::Embedding => vec![tensor(EMBEDDING.into(), &[v, h])],
            LayerKind::Head => {
                let head = if self.tie_embeddings { EMBEDDING } else { "lm_head.weight" };
                vec![tensor("model.norm.weight".into(), &[h]), tensor(head.into(), &[v, h])]
            }
            LayerKind::Block => {
                let block = |suffix: &str, shape: &[u64]| {
                    tensor(format!("model.layers.{}.{suffix}.weight", layer - 1), shape)
                };
                vec![
                    block("input_layernorm", &[h]),
                    block("self_attn.q_proj", &[q, h]),
                    block("self_attn.k_proj", &[kv, h]),
                    block("self_attn.v_proj", &[kv, h]),
                    block("self_attn.o_proj", &[h, q]),
                    block("post_attention_layernorm", &[h]),
                    block("mlp.gate_proj", &[f, h]),
                    block("mlp.up_proj", &[f, h]),
                    block("mlp.down_proj", &[h, f]),
                ]
            }
        }
    }

    /// The distinct tensors of a range of layers, each at the lowest layer that uses it: where its
    /// gradient is final last.
    pub fn stage_tensors(&self, layers: std::ops::Range<u32>) -> Vec<(u32, TensorSpec)> {
        let mut found: Vec<(u32, TensorSpec)> = Vec::new();
        let mut has_embedding = false;
        for layer in layers {
            for tensor in self.layer_tensors(layer) {
                // The embedding is the one tensor that two layers may use.
                if tensor.name != EMBEDDING || !std::mem::replace(&mut has_embedding, true) {
                    found.push((layer, tensor));
                }
            }
        }
        found
    }

    /// All distinct tensors, in layer order.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        self.stage_tensors(0..self.num_placeable_layers()).into_iter().map(|(_, tensor)| tensor).collect()
    }

    /// Parameters in all; a tied embedding counts once.
    pub fn num_parameters(&self) -> u64 {
        self.tensors().iter().map(TensorSpec::num_elements).sum()
    }

    /// Floating-point operations that the mathematics of one layer needs for one sample of
    /// `seq_len` tokens, forward: 2 a multiply-add, causal attention counted as half of the full
    /// square. Backward needs twice as much. (Narayanan et al. 2021, arXiv 2104.04473, with the
    /// causal half.)
    pub fn layer_forward_flops(&self, layer: u32, seq_len: u32) -> f64 {
        let s = f64::from(seq_len);
        match self.layer_kind(layer) {
            LayerKind::Embedding => 0.0,
            LayerKind::Head => 2.0 * s * f64::from(self.hidden_size) * f64::from(self.vocab_size),
            LayerKind::Block => {
                let weights: u64 = self
                    .layer_tensors(layer)
                    .iter()
                    .filter(|t| t.decays())
                    .map(TensorSpec::num_elements)
                    .sum();
                let attention = 2.0 * s * s * f64::from(self.num_heads * self.head_dim);
                2.0 * s * weights as f64 + attention
            }
        }
    }

    /// Model flops of one sample of `seq_len` tokens, forward and backward, over a range of layers.
    pub fn train_flops(&self, layers: std::ops::Range<u32>, seq_len: u32) -> f64 {
        layers.map(|layer| 3.0 * self.layer_forward_flops(layer, seq_len)).sum()
    }

    /// The `head_dim / 2` inverse rotary frequencies, scaled. Computed once here so that every
    /// engine uses the same numbers.
    pub fn inverse_frequencies(&self) -> Vec<f64> {
        let dim = f64::from(self.head_dim);
        (0..self.head_dim / 2)
            .map(|i| {
                let plain = self.rope_theta.powf(-2.0 * f64::from(i) / dim);
                match self.rope_scaling {
                    RopeScaling::Default => plain,
                    RopeScaling::Linear { factor } => plain / factor,
                    RopeScaling::Llama3 {
                        factor,
                        low_freq_factor,
                        high_freq_factor,
                        original_max_position,
                    } => {
                        let wavelength = std::f64::consts::TAU / plain;
                        let context = original_max_position as f64;
                        if wavelength < context / high_freq_factor {
                            plain
                        } else if wavelength > context / low_freq_factor {
                            plain / factor
                        } else {
                            let smooth = (context / wavelength - low_freq_factor)
                                / (high_freq_factor - low_freq_factor);
                            (1.0 - smooth) * plain / factor + smooth * plain
                        }
                    }
                }
            })
            .collect()
    }
}

/// Keys that `config.json` carries and that change nothing here.
const IGNORED: &[&str] = &[
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

/// Keys that shape the model.
const KNOWN: &[&str] = &[
    "attention_bias",
    "attention_dropout",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pretraining_tp",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
];

const ROPE_KEYS: &[&str] = &[
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "original_max_position_embeddings",
    "rope_theta",
    "rope_type",
    "type",
];

/// A JSON object with its place, for errors.
pub(crate) struct Config<'a> {
    pub(crate) file: &'a str,
    pub(crate) map: &'a Map<String, Value>,
    pub(crate) path: &'static str,
}

impl Config<'_> {
    fn model(&self) -> Result<ModelSpec> {
        self.only_keys(KNOWN, IGNORED)?;
        self.require("model_type", "\"llama\"", |v| v.as_str() == Some("llama"))?;
        self.require("hidden_act", "\"silu\"", |v| v.as_str() == Some("silu"))?;
        self.require("attention_bias", "false", |v| v.as_bool() == Some(false))?;
        self.require("mlp_bias", "false", |v| v.as_bool() == Some(false))?;
        self.require("attention_dropout", "0", |v| v.as_f64() == Some(0.0))?;
        self.require("pretraining_tp", "1", |v| v.as_u64() == Some(1))?;

        let hidden_size = self.count("hidden_size", None)?;
        let num_heads = self.count("num_attention_heads", None)?;
        let num_kv_heads = self.count("num_key_value_heads", Some(num_heads))?;
        if !num_heads.is_multiple_of(num_kv_heads) {
            return Err(
                self.bad("num_key_value_heads", format!("a divisor of num_attention_heads = {num_heads}"))
            );
        }
        if !self.map.contains_key("head_dim") && !hidden_size.is_multiple_of(num_heads) {
            return Err(self.bad(
                "hidden_size",
                format!("a multiple of num_attention_heads = {num_heads}, or `head_dim` given"),
            ));
        }
        let head_dim = self.count("head_dim", Some(hidden_size / num_heads))?;
        if !head_dim.is_multiple_of(2) {
            return Err(self.bad("head_dim", "even (rotary embedding turns pairs)".into()));
        }
        let (rope_theta, rope_scaling) = self.rope()?;
        let spec = ModelSpec {
            vocab_size: self.count("vocab_size", None)?,
            hidden_size,
            intermediate_size: self.count("intermediate_size", None)?,
            num_layers: self.count("num_hidden_layers", None)?,
            num_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps: self.positive("rms_norm_eps", Some(1e-6))?,
            rope_theta,
            rope_scaling,
            tie_embeddings: match self.map.get("tie_word_embeddings") {
                None => false,
                Some(Value::Bool(tied)) => *tied,
                Some(_) => return Err(self.bad("tie_word_embeddings", "true or false".into())),
            },
            max_position: self.count("max_position_embeddings", Some(2048))?,
            initializer_range: self.positive("initializer_range", Some(0.02))?,
        };
        spec.validate(self.file)?;
        Ok(spec)
    }

    /// `rope_theta` and `rope_scaling` as older configurations have them, or both in
    /// `rope_parameters` as newer ones do.
    fn rope(&self) -> Result<(f64, RopeScaling)> {
        let theta = self.positive("rope_theta", Some(10_000.0))?;
        for (key, path) in [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")] {
            match self.map.get(key) {
                None | Some(Value::Null) => {}
                Some(Value::Object(map)) => return Config { file: self.file, map, path }.rope_object(theta),
                Some(_) => return Err(self.bad(key, "an object or null".into())),
            }
        }
        Ok((theta, RopeScaling::Default))
    }

    fn rope_object(&self, theta: f64) -> Result<(f64, RopeScaling)> {
        self.only_keys(ROPE_KEYS, &[])?;
        let theta = self.positive("rope_theta", Some(theta))?;
        let key = if self.map.contains_key("rope_type") { "rope_type" } else { "type" };
        let scaling = match self.map.get(key).and_then(Value::as_str) {
            Some("default") => RopeScaling::Default,
            Some("linear") => RopeScaling::Linear { factor: self.positive("factor", None)? },
            Some("llama3") => {
                let (low, high) =
                    (self.positive("low_freq_factor", None)?, self.positive("high_freq_factor", None)?);
                if low >= high {
                    return Err(self.bad("low_freq_factor", format!("less than high_freq_factor = {high}")));
                }
                RopeScaling::Llama3 {
                    factor: self.positive("factor", None)?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position: u64::from(self.count("original_max_position_embeddings", None)?),
                }
            }
            _ => return Err(self.bad(key, "\"default\", \"linear\" or \"llama3\"".into())),
        };
        Ok((theta, scaling))
    }

    fn only_keys(&self, known: &[&str], ignored: &[&str]) -> Result<()> {
        match self.map.keys().find(|key| !known.contains(&key.as_str()) && !ignored.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => Err(Error::UnknownKey {
                file: self.file.into(),
                key: format!("{}{key}", self.path),
                suggestion: nearest(key, known.iter().copied()).map(Into::into),
                allowed: known.join(", "),
            }),
        }
    }

    fn require(&self, key: &str, allowed: &str, ok: impl Fn(&Value) -> bool) -> Result<()> {
        match self.map.get(key) {
            Some(value) if !ok(value) => Err(self.bad(key, allowed.into())),
            _ => Ok(()),
        }
    }

    pub(crate) fn count(&self, key: &str, default: Option<u32>) -> Result<u32> {
        match (self.map.get(key), default) {
            (None | Some(Value::Null), Some(default)) => Ok(default),
            (Some(value), _) if value.as_u64().is_some_and(|n| (1..=1 << 24).contains(&n)) => {
                Ok(value.as_u64().unwrap_or_default() as u32)
            }
            _ => Err(self.bad(key, "a whole number from 1 to 16777216".into())),
        }
    }

    fn positive(&self, key: &str, default: Option<f64>) -> Result<f64> {
        match (self.map.get(key), default) {
            (None | Some(Value::Null), Some(default)) => Ok(default),
            (Some(value), _) if value.as_f64().is_some_and(|x| x.is_finite() && x > 0.0) => {
                Ok(value.as_f64().unwrap_or_default())
            }
            _ => Err(self.bad(key, "a positive number".into())),
        }
    }

    pub(crate) fn bad(&self, key: &str, allowed: String) -> Error {
        Error::Value {
            file: self.file.into(),
            key: format!("{}{key}", self.path),
            found: self.map.get(key).map_or_else(|| "missing".into(), ToString::to_string),
            allowed,
        }
    }
}

#[cfg(test)]
mod tests;
