//! Sizes from a Hugging Face `config.json`, whose keys differ from family to family.

use serde_json::Value;

use super::families::{Latent, Routing, Sizes};
use super::{Architecture, FAMILIES};
use crate::model::Config;
use crate::suggest::nearest;
use crate::{Error, Result};

/// Most layers, so that a damaged file cannot ask for endless tables.
const MAX_LAYERS: u32 = 1 << 14;

pub(super) fn read(file: &str, text: &str) -> Result<Architecture> {
    let value: Value = crate::canonical::decode(file, text)?;
    let Value::Object(map) = value else {
        return Err(Error::Syntax { file: file.into(), line: None, message: "must be a JSON object".into() });
    };
    let config = Config { file, map: &map, path: "" };
    let family = map.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let sizes = match family {
        "llama" | "mistral" | "qwen2" | "qwen3" | "mixtral" | "qwen2_moe" | "qwen3_moe" => {
            llama_like(&config, family)?
        }
        "deepseek" | "deepseek_v2" | "deepseek_v3" => deepseek(&config, family)?,
        "gpt2" => gpt2(&config)?,
        "gpt_neo" => gpt_neo(&config)?,
        "opt" => opt(&config)?,
        _ => return Err(unknown_family(&config, family)),
    };
    if sizes.layers > MAX_LAYERS {
        let key = if map.contains_key("n_layer") { "n_layer" } else { "num_hidden_layers" };
        return Err(config.bad(key, format!("at most {MAX_LAYERS}")));
    }
    Ok(sizes.architecture())
}

fn unknown_family(config: &Config<'_>, family: &str) -> Error {
    let names = FAMILIES.map(|(name, _)| name);
    let near = nearest(family, names).map_or_else(String::new, |near| format!(" (did you mean `{near}`?)"));
    config.bad(
        "model_type",
        format!(
            "one of {}{near}. A model whose blocks are Llama's (RMS norms, grouped-query attention, gated MLP) \
             can be planned with \"llama\" and the keys vocab_size, hidden_size, intermediate_size, \
             num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim, tie_word_embeddings; \
             any other needs its parameters and products a layer counted in hgct first",
            names.join(", ")
        ),
    )
}

/// Llama and what came of it: RMS norms, rotary positions, gated MLP, grouped-query attention.
fn llama_like(config: &Config<'_>, family: &str) -> Result<Sizes> {
    let hidden = config.count("hidden_size", None)?;
    let heads = config.count("num_attention_heads", None)?;
    let default_kv = if matches!(family, "mistral" | "mixtral") { 8 } else { heads };
    let kv_heads = config.count("num_key_value_heads", Some(default_kv))?;
    divides(config, "num_key_value_heads", kv_heads, "num_attention_heads", heads)?;
    let default_dim = if family.starts_with("qwen3") { 128 } else { hidden / heads };
    if !config.map.contains_key("head_dim") && !family.starts_with("qwen3") {
        divides(config, "num_attention_heads", heads, "hidden_size", hidden)?;
    }
    let qwen2 = family.starts_with("qwen2");
    let attention_bias = flag(config, "attention_bias", false)?;
    let layers = config.count("num_hidden_layers", None)?;
    let experts = match family {
        "mixtral" => Some(Routing {
            count: config.count("num_local_experts", Some(8))?,
            per_token: config.count("num_experts_per_tok", Some(2))?,
            intermediate: config.count("intermediate_size", None)?,
            shared: 0,
            shared_gate: false,
            router_bias: false,
            sparse: vec![true; layers as usize],
        }),
        "qwen2_moe" | "qwen3_moe" => Some(qwen_experts(config, family, layers)?),
        _ => None,
    };
    check_routing(config, experts.as_ref())?;
    let window = match family {
        "mistral" | "mixtral" => optional(config, "sliding_window")?,
        _ => None,
    };
    Ok(Sizes {
        layers,
        heads,
        kv_heads,
        head_dim: config.count("head_dim", Some(default_dim))?,
        intermediate: config.count("intermediate_size", None)?,
        tied: flag(config, "tie_word_embeddings", false)?,
        qkv_bias: qwen2 || attention_bias,
        out_bias: !qwen2 && attention_bias,
        mlp_bias: flag(config, "mlp_bias", false)?,
        head_norms: family.starts_with("qwen3"),
        window,
        experts,
        ..Sizes::new(family, hidden, config.count("vocab_size", None)?, positions(config)?)
    })
}

fn qwen_experts(config: &Config<'_>, family: &str, layers: u32) -> Result<Routing> {
    let step = config.count("decoder_sparse_step", Some(1))?;
    let dense: Vec<u64> = match config.map.get("mlp_only_layers") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(rows)) => rows.iter().filter_map(Value::as_u64).collect(),
        Some(_) => return Err(config.bad("mlp_only_layers", "a list of layers".into())),
    };
    let shared =
        if family == "qwen2_moe" { config.count("shared_expert_intermediate_size", None)? } else { 0 };
    Ok(Routing {
        count: config.count("num_experts", None)?,
        per_token: config.count("num_experts_per_tok", None)?,
        intermediate: config.count("moe_intermediate_size", None)?,
        shared,
        shared_gate: shared > 0,
        router_bias: false,
        sparse: (0..layers)
            .map(|layer| (layer + 1).is_multiple_of(step) && !dense.contains(&u64::from(layer)))
            .collect(),
    })
}

/// DeepSeekMoE (arXiv 2401.06066), V2 and V3: shared and routed experts behind dense first blocks,
/// from V2 on with latent attention. The extra prediction layers of V3's training are not counted,
/// as `transformers` does not load them.
fn deepseek(config: &Config<'_>, family: &str) -> Result<Sizes> {
    let hidden = config.count("hidden_size", None)?;
    let heads = config.count("num_attention_heads", None)?;
    let kv_heads = config.count("num_key_value_heads", Some(heads))?;
    divides(config, "num_key_value_heads", kv_heads, "num_attention_heads", heads)?;
    divides(config, "num_attention_heads", heads, "hidden_size", hidden)?;
    let layers = config.count("num_hidden_layers", None)?;
    let latent = match family {
        "deepseek" => None,
        _ => Some(Latent {
            q_rank: optional(config, "q_lora_rank")?,
            kv_rank: config.count("kv_lora_rank", None)?,
            nope_dim: config.count("qk_nope_head_dim", None)?,
            rope_dim: config.count("qk_rope_head_dim", None)?,
            value_dim: config.count("v_head_dim", None)?,
        }),
    };
    let intermediate = config.count("moe_intermediate_size", None)?;
    let (step, first) =
        (config.count("moe_layer_freq", Some(1))?, natural(config, "first_k_dense_replace", 0)?);
    let experts = Routing {
        count: config.count("n_routed_experts", None)?,
        per_token: config.count("num_experts_per_tok", None)?,
        intermediate,
        shared: natural(config, "n_shared_experts", 0)?.saturating_mul(intermediate),
        shared_gate: false,
        router_bias: family == "deepseek_v3",
        sparse: (0..layers).map(|layer| layer >= first && layer.is_multiple_of(step)).collect(),
    };
    check_routing(config, Some(&experts))?;
    Ok(Sizes {
        layers,
        heads,
        kv_heads,
        head_dim: hidden / heads,
        intermediate: config.count("intermediate_size", None)?,
        tied: flag(config, "tie_word_embeddings", false)?,
        latent,
        experts: Some(experts),
        ..Sizes::new(family, hidden, config.count("vocab_size", None)?, positions(config)?)
    })
}

/// GPT-2: layer norms and biases everywhere, learnt positions, tied embeddings.
fn gpt2(config: &Config<'_>) -> Result<Sizes> {
    let hidden = config.count("n_embd", None)?;
    let heads = config.count("n_head", None)?;
    divides(config, "n_head", heads, "n_embd", hidden)?;
    let positions = config.count("n_positions", Some(1024))?;
    Ok(Sizes {
        positions,
        layers: config.count("n_layer", None)?,
        intermediate: config.count("n_inner", Some(hidden.saturating_mul(4)))?,
        tied: flag(config, "tie_word_embeddings", true)?,
        qkv_bias: true,
        out_bias: true,
        ..with_layer_norms("gpt2", hidden, heads, config.count("vocab_size", None)?, positions)
    })
}

/// GPT-Neo: as GPT-2 without biases before queries, keys and values. Its local layers compute the
/// whole square and mask it.
fn gpt_neo(config: &Config<'_>) -> Result<Sizes> {
    let hidden = config.count("hidden_size", None)?;
    let heads = config.count("num_heads", None)?;
    divides(config, "num_heads", heads, "hidden_size", hidden)?;
    let positions = positions(config)?;
    Ok(Sizes {
        positions,
        layers: config.count("num_layers", None)?,
        intermediate: config.count("intermediate_size", Some(hidden.saturating_mul(4)))?,
        tied: flag(config, "tie_word_embeddings", true)?,
        out_bias: true,
        ..with_layer_norms("gpt_neo", hidden, heads, config.count("vocab_size", None)?, positions)
    })
}

/// OPT: as GPT-2, with two rows of positions more, and in one size an embedding narrower than the
/// stream.
fn opt(config: &Config<'_>) -> Result<Sizes> {
    let hidden = config.count("hidden_size", None)?;
    let heads = config.count("num_attention_heads", None)?;
    divides(config, "num_attention_heads", heads, "hidden_size", hidden)?;
    let biases = flag(config, "enable_bias", true)?;
    let max_position = positions(config)?;
    let affine = flag(config, "layer_norm_elementwise_affine", true)?;
    let before = flag(config, "do_layer_norm_before", true)?;
    Ok(Sizes {
        embedding: config.count("word_embed_proj_dim", Some(hidden))?,
        positions: max_position + 2,
        layers: config.count("num_hidden_layers", None)?,
        intermediate: config.count("ffn_dim", None)?,
        tied: flag(config, "tie_word_embeddings", true)?,
        norm: if affine { 2 } else { 0 },
        final_norm: before && !flag(config, "_remove_final_layer_norm", false)?,
        qkv_bias: biases,
        out_bias: biases,
        mlp_bias: biases,
        ..with_layer_norms("opt", hidden, heads, config.count("vocab_size", None)?, max_position)
    })
}

fn with_layer_norms(family: &str, hidden: u32, heads: u32, vocab: u32, max_position: u32) -> Sizes {
    Sizes {
        heads,
        kv_heads: heads,
        head_dim: hidden / heads,
        gated: false,
        norm: 2,
        mlp_bias: true,
        ..Sizes::new(family, hidden, vocab, max_position)
    }
}

fn positions(config: &Config<'_>) -> Result<u32> {
    config.count("max_position_embeddings", Some(2048))
}

fn check_routing(config: &Config<'_>, routing: Option<&Routing>) -> Result<()> {
    match routing {
        Some(routing) if routing.per_token > routing.count => {
            Err(config
                .bad("num_experts_per_tok", format!("at most the number of experts, {}", routing.count)))
        }
        _ => Ok(()),
    }
}

fn divides(config: &Config<'_>, key: &str, part: u32, whole_key: &str, whole: u32) -> Result<()> {
    if whole.is_multiple_of(part) {
        return Ok(());
    }
    Err(config.bad(key, format!("a divisor of {whole_key} = {whole}")))
}

fn flag(config: &Config<'_>, key: &str, default: bool) -> Result<bool> {
    match config.map.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(value)) => Ok(*value),
        Some(_) => Err(config.bad(key, "true or false".into())),
    }
}

/// A count that may be missing or null.
fn optional(config: &Config<'_>, key: &str) -> Result<Option<u32>> {
    match config.map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => config.count(key, None).map(Some),
    }
}

/// A count that may be 0.
fn natural(config: &Config<'_>, key: &str, default: u32) -> Result<u32> {
    match config.map.get(key) {
        Some(value) if value.as_u64() == Some(0) => Ok(0),
        None | Some(Value::Null) => Ok(default),
        Some(_) => config.count(key, None),
    }
}
