//! Configurations that are read, and those that are refused.

use super::*;

fn parse(extra: &str) -> Result<ModelSpec> {
    let text = format!(
        r#"{{"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "rope_theta": 500000.0, "tie_word_embeddings": true, "max_position_embeddings": 131072{extra}}}"#
    );
    ModelSpec::from_config_json("config.json", &text)
}

#[test]
fn llama_3_2_1b_has_its_published_parameter_count() {
    // Hugging Face's model card counts 1,235,814,400 parameters.
    assert_eq!(parse("").unwrap().num_parameters(), 1_235_814_400);
}

#[test]
fn a_key_it_does_not_know_is_an_error_with_a_suggestion() {
    let error = parse(r#", "rope_thetta": 1.0"#).unwrap_err().to_string();
    assert!(
        error.starts_with("config.json: unknown key `rope_thetta`: did you mean `rope_theta`?"),
        "{error}"
    );
    let error = parse(r#", "sliding_window": 4096"#).unwrap_err().to_string();
    assert!(error.contains("unknown key `sliding_window`"), "{error}");
}

#[test]
fn llama3_scaling_leaves_high_frequencies_and_divides_low_ones() {
    let spec = parse(
        r#", "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}"#,
    )
    .unwrap();
    let scaled = spec.inverse_frequencies();
    let plain = ModelSpec { rope_scaling: RopeScaling::Default, ..spec }.inverse_frequencies();
    assert_eq!(scaled[0].to_bits(), plain[0].to_bits());
    assert_eq!(scaled[31].to_bits(), (plain[31] / 32.0).to_bits());
    assert!(scaled.windows(2).all(|w| w[0] > w[1]));
}

#[test]
fn the_written_config_reads_back_the_same() {
    let spec =
        parse(r#", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10.0}"#).unwrap();
    assert_eq!(spec.rope_theta.to_bits(), 10f64.to_bits());
    assert_eq!(ModelSpec::from_config_json("x", &spec.to_config_json()).unwrap(), spec);
}

#[test]
fn a_tied_embedding_is_one_tensor_at_the_lowest_layer() {
    let spec = parse("").unwrap();
    let whole = spec.stage_tensors(0..18);
    assert_eq!(whole.iter().filter(|(_, t)| t.name == EMBEDDING).map(|(l, _)| *l).collect::<Vec<_>>(), [0]);
    assert!(spec.stage_tensors(17..18).iter().any(|(layer, t)| *layer == 17 && t.name == EMBEDDING));
}
