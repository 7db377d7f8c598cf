//! A mixture of experts from its `config.json` to a plan, a simulated step and another program's words.

use serde_json::Value;

use crate::planning::Documents;

/// Mixtral 8x7B with 8 of its 32 layers.
const MIXTRAL: &str = r#"{"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096,
  "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8,
  "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768}"#;

/// A node of each of two kinds.
const CLUSTER: &str = r#"format = 1
[[group]]
name = "fast"
kind = "a100-80"
nodes = 1
devices = 8
nics = 8
nic_bytes_per_s = 25e9
[[group]]
name = "slow"
kind = "v100-32"
nodes = 1
devices = 8
nics = 2
nic_bytes_per_s = 12.5e9
[[link]]
between = ["fast", "slow"]
bytes_per_s = 10e9
"#;

/// A number of a row.
fn number(row: &Value, key: &str) -> u64 {
    row[key].as_u64().unwrap_or_else(|| panic!("{key}: {row}"))
}

#[test]
fn divided_experts_are_planned_simulated_and_exported() {
    let documents = Documents::new();
    documents.put("config.json", MIXTRAL);
    documents.put("cluster.toml", CLUSTER);
    let answer = documents.json(&["--seq-len", "512", "--schedules", "1f1b", "-o", "plan.json"]);
    let rows = answer["rows"].as_array().unwrap();
    for row in rows {
        // Whole experts on each device, in groups larger than those of tensor parallelism.
        let experts = number(row, "expert_parallel");
        assert!(8 % experts == 0 && experts > number(row, "tensor_parallel"), "{row}");
        assert!(number(row, "memory_bytes") <= number(row, "memory_limit_bytes"), "{row}");
    }
    for kind in ["fast", "slow"] {
        assert!(rows.iter().any(|row| row["kind"] == kind), "{kind} is idle: {rows:?}");
    }

    let output = documents.hgct(&["simulate", "plan.json", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let figures: Value = serde_json::from_slice(&output.stdout).unwrap();
    let of = |key: &str| figures[key].as_f64().unwrap();
    assert_eq!((&figures["priced_s"], &figures["samples"]), (&answer["iteration_seconds"], &Value::from(64)));
    assert!(of("roofline_s") <= of("step_s") && of("step_s") <= of("serial_s"), "{figures}");
    assert!((of("step_s") / of("priced_s") - 1.0).abs() < 0.05, "{figures}");

    // Its stages have the same groups, so Megatron-LM has words for all of them.
    let output = documents.hgct(&["export", "plan.json", "--to", "megatron"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    for (word, value) in [
        ("expert-model-parallel-size", number(&rows[0], "expert_parallel")),
        ("expert-tensor-parallel-size", 1),
        ("tensor-model-parallel-size", number(&rows[0], "tensor_parallel")),
        ("pipeline-model-parallel-size", rows.len() as u64),
        ("num-layers", 8),
        ("global-batch-size", 64),
    ] {
        assert!(text.contains(&format!("--{word} {value}\n")), "--{word} {value} is not in\n{text}");
    }
    for (target, says) in
        [("flagscale", "divide experts among data-parallel ranks alone"), ("deepspeed", "routed experts")]
    {
        let output = documents.hgct(&["export", "plan.json", "--to", target]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(
            output.status.code() == Some(2) && output.stdout.is_empty() && error.contains(says),
            "{error}"
        );
    }
}
