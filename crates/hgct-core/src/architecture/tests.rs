//! Published models have their published sizes; what is not known is refused.

use super::*;

fn read(text: &str) -> Architecture {
    Architecture::from_config_json("config.json", text).unwrap()
}

fn error(text: &str) -> String {
    Architecture::from_config_json("config.json", text).unwrap_err().to_string()
}

/// Name, sizes that differ from their family's defaults, and the number of parameters that the
/// model's published weights have.
const PUBLISHED: [(&str, &str, u64); 22] = [
    (
        "Llama 2 7B",
        r#"{"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32}"#,
        6_738_415_616,
    ),
    (
        "Llama 2 70B",
        r#"{"model_type": "llama", "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672,
            "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}"#,
        68_976_648_192,
    ),
    (
        "Llama 3.1 8B",
        r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}"#,
        8_030_261_248,
    ),
    (
        "Llama 3.2 1B",
        r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "tie_word_embeddings": true}"#,
        1_235_814_400,
    ),
    (
        "Llama 3.1 405B",
        r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248,
            "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8}"#,
        405_853_388_800,
    ),
    (
        "Mistral 7B",
        r#"{"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096}"#,
        7_241_732_096,
    ),
    (
        "Qwen2 0.5B",
        r#"{"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": true}"#,
        494_032_768,
    ),
    (
        "Qwen2 7B",
        r#"{"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}"#,
        7_615_616_512,
    ),
    (
        "Qwen3 0.6B",
        r#"{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "tie_word_embeddings": true}"#,
        596_049_920,
    ),
    (
        "Qwen3 8B",
        r#"{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}"#,
        8_190_735_360,
    ),
    (
        "GPT-2",
        r#"{"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}"#,
        124_439_808,
    ),
    (
        "GPT-2 XL",
        r#"{"model_type": "gpt2", "vocab_size": 50257, "n_embd": 1600, "n_layer": 48, "n_head": 25}"#,
        1_557_611_200,
    ),
    (
        "OPT 125M",
        r#"{"model_type": "opt", "vocab_size": 50272, "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "word_embed_proj_dim": 768, "max_position_embeddings": 2048}"#,
        125_239_296,
    ),
    (
        "OPT 350M",
        r#"{"model_type": "opt", "vocab_size": 50272, "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "word_embed_proj_dim": 512, "do_layer_norm_before": false,
            "max_position_embeddings": 2048}"#,
        331_196_416,
    ),
    (
        "OPT 6.7B",
        r#"{"model_type": "opt", "vocab_size": 50272, "hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32,
            "num_attention_heads": 32, "word_embed_proj_dim": 4096, "max_position_embeddings": 2048}"#,
        6_658_473_984,
    ),
    (
        "GPT-Neo 125M",
        r#"{"model_type": "gpt_neo", "vocab_size": 50257, "hidden_size": 768, "num_layers": 12, "num_heads": 12,
            "max_position_embeddings": 2048, "intermediate_size": null}"#,
        125_198_592,
    ),
    (
        "GPT-Neo 2.7B",
        r#"{"model_type": "gpt_neo", "vocab_size": 50257, "hidden_size": 2560, "num_layers": 32, "num_heads": 20,
            "max_position_embeddings": 2048}"#,
        2_651_307_520,
    ),
    (
        "Mixtral 8x7B",
        r#"{"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
            "num_experts_per_tok": 2}"#,
        46_702_792_704,
    ),
    (
        "Qwen1.5 MoE A2.7B",
        r#"{"model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
            "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60,
            "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16}"#,
        14_315_784_192,
    ),
    (
        "Qwen3 30B A3B",
        r#"{"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
            "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "mlp_only_layers": []}"#,
        30_532_122_624,
    ),
    (
        "DeepSeekMoE 16B",
        r#"{"model_type": "deepseek", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
            "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
            "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 16}"#,
        16_375_728_128,
    ),
    (
        "DeepSeek-V2 Lite",
        r#"{"model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
            "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
            "first_k_dense_replace": 1, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
            "q_lora_rank": null, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128}"#,
        15_706_484_224,
    ),
];

const DEEPSEEK_V3: &str = r#"{"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "num_nextn_predict_layers": 1}"#;

#[test]
fn published_models_have_their_published_number_of_parameters() {
    let counted: Vec<_> =
        PUBLISHED.iter().map(|(name, text, _)| (*name, read(text).num_parameters())).collect();
    let published: Vec<_> = PUBLISHED.iter().map(|(name, _, count)| (*name, *count)).collect();
    assert_eq!(counted, published);
}

#[test]
fn deepseek_v3_has_671_billion_parameters_of_which_a_token_meets_37() {
    let model = read(DEEPSEEK_V3);
    assert_eq!(model.num_parameters(), 671_026_419_200);
    assert_eq!(model.num_active_parameters() / 100_000_000, 375);
    assert_eq!(model.runs, [(0, 1), (1, 3), (2, 58), (3, 1)]);
    assert!(model.has_experts());
}

#[test]
fn a_trainable_model_and_its_configuration_are_the_same_architecture() {
    let text = PUBLISHED[3].1;
    let spec = ModelSpec::from_config_json("config.json", text).unwrap();
    let (from_spec, from_config) = (Architecture::from(&spec), read(text));
    assert_eq!(from_spec, from_config);
    assert_eq!(from_spec.num_parameters(), spec.num_parameters());
    for (layer, class) in (0..).zip(from_spec.layers()) {
        assert_eq!(class.kind, spec.layer_kind(layer));
        let both = (class.forward_flops(777), spec.layer_forward_flops(layer, 777));
        assert!((both.0 - both.1).abs() <= 1e-9 * both.1, "layer {layer}: {both:?}");
    }
    assert!((from_spec.train_flops(64) / spec.train_flops(0..18, 64) - 1.0).abs() < 1e-12);
}

#[test]
fn a_gpt_block_saves_what_the_published_table_says() {
    // Korthikanti et al. 2022, table 2: 34 s·b·h, less the 2 of dropout masks; 8 are whole on each rank.
    let gpt = read(PUBLISHED[10].1);
    let h = 768;
    let bytes = |t| gpt.classes[1].activation_bytes(1024, DType::Bf16, t, h, Kept::All) / (1024 * 768);
    assert_eq!(bytes(1), 8 + 8 + 16);
    assert_eq!(bytes(8), 8 + 3);
    assert_eq!(gpt.classes[1].activation_bytes(1024, DType::Bf16, 8, h, Kept::Input), 2 * 1024 * 768);
}

#[test]
fn a_window_bounds_what_attention_costs() {
    let mistral = read(PUBLISHED[5].1);
    let block = &mistral.classes[1];
    assert!((block.attention_flops(4096) / (2.0 * 4096.0 * 4096.0 * 4096.0) - 1.0).abs() < 1e-12);
    let ratio = block.attention_flops(16384) / block.attention_flops(4096);
    assert!((ratio - 7.0).abs() < 1e-9, "{ratio}");
}

#[test]
fn ranks_of_a_group_hold_their_part() {
    let mixtral = read(PUBLISHED[17].1);
    let block = &mixtral.classes[1];
    assert_eq!(block.parameters_a_rank(1, 1), block.num_parameters());
    assert!(block.parameters_a_rank(8, 1) < block.num_parameters() / 7);
    let experts = block.num_expert_parameters();
    assert_eq!(block.parameters_a_rank(1, 1) - block.parameters_a_rank(1, 8), experts - experts / 8);
    assert!(mixtral.allows_tensor_parallel(8) && !mixtral.allows_tensor_parallel(3));
    assert!(!mixtral.allows_tensor_parallel(0));
}

#[test]
fn an_unknown_architecture_is_told_what_is_needed() {
    let message = error(r#"{"model_type": "lama"}"#);
    assert!(message.starts_with("config.json: `model_type` is \"lama\", but must be one of llama, mistral"));
    assert!(
        message.contains("did you mean `llama`?") && message.contains("num_key_value_heads"),
        "{message}"
    );
    assert!(error(r#"{"hidden_size": 3}"#).contains("`model_type` is missing"));
    assert!(error("[1]").contains("must be a JSON object"));
    assert!(error("{").starts_with("config.json"));
}

#[test]
fn impossible_sizes_are_refused() {
    let with = |from: &str, to: &str| {
        assert!(PUBLISHED[17].1.contains(from));
        error(&PUBLISHED[17].1.replace(from, to))
    };
    assert!(with(r#""hidden_size": 4096"#, r#""hidden_size": 0"#).contains("`hidden_size` is 0"));
    assert!(with(r#""num_key_value_heads": 8"#, r#""num_key_value_heads": 5"#).contains("a divisor of"));
    assert!(
        with(r#""num_experts_per_tok": 2"#, r#""num_experts_per_tok": 9"#).contains("number of experts, 8")
    );
    assert!(with(r#""num_hidden_layers": 32"#, r#""num_hidden_layers": 99999"#).contains("at most 16384"));
    assert!(with(r#""num_hidden_layers": 32,"#, "").contains("`num_hidden_layers` is missing"));
    assert!(error(r#"{"model_type": "gpt2", "n_embd": 10, "n_head": 3}"#).contains("`n_head` is 3"));
}
