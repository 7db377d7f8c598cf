//! `hgct validate`, `simulate` and `export` as processes: what they print, and what they refuse.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

fn hgct(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hgct")).args(args).current_dir(folder).output().unwrap()
}

fn printed(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Exit code 2 and one line that says so.
fn refused(output: &Output, says: &str) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains(says), "{error:?} does not say {says:?}");
}

/// Tables of one kind with nodes of two devices, a model of four layers, and plans that were run.
fn tables(folder: &Path) {
    let layers = |scale: f64| {
        json!({"0": [0.001 * scale, 0.0001, 0.001], "1": [0.01 * scale, 0.02 * scale, 0.001],
               "2": [0.01 * scale, 0.02 * scale, 0.001], "3": [0.004 * scale, 0.008 * scale, 0.001]})
    };
    let floats = |degree: f64| {
        let row = |parameters: f64, kept: f64| {
            json!({"params_floats": parameters / degree, "act_output_floats": 1e6, "act_input_floats": 1e6,
                   "act_mem_floats": kept / degree})
        };
        json!({"0": row(4e6, 1e6), "1": row(1e7, 4e7), "2": row(1e7, 4e7), "3": row(4e6, 8e6)})
    };
    let kind = json!({"1": {"1": layers(1.0), "2": layers(0.6)}, "2": {"1": layers(1.8), "2": layers(1.0)}});
    let profiles = json!({"tiny": {
        "config": {"sequence_length": 128, "hidden_size": 64},
        "layer_seconds": {"CARD": kind},
        "layer_floats": {"1": floats(1.0), "2": floats(2.0)},
    }});
    let link = json!([[0.0, 1.0, 10.0], 2e10]);
    let peers = json!({"CARD": {"1": link, "2": link}});
    let network = json!({
        "nodes": {"CARD": {"gpus_per_node": 2, "mem_per_gpu": 4e10}},
        "intra_node": {"CARD": {"2": link}},
        "inter_node": {"CARD": {"1": peers, "2": peers}},
    });
    let replica = json!([{"gpu": "CARD", "tp": 2, "count": 2}]);
    let measured = json!({"id": "a/b", "model": "tiny", "micro_batch": 2, "global_batch": 16, "iteration_s": 0.4,
        "stages": [{"layers": [0, 1], "replicas": replica}, {"layers": [2, 3], "replicas": replica}],
        "max_memory_bytes": 4e9});
    let csv = "global batch,micro batch,hidden size,attention heads,# layers,sequence length,tensor parallelism,data parallelism,pipeline parallelism,iteration time (ms)\n512,8,3072,32,32,2048,1,64,1,3500\n";
    for (name, text) in [
        ("profiles.json", profiles.to_string()),
        ("network.json", network.to_string()),
        ("measured_mixed.jsonl", format!("{measured}\n")),
        ("measured_a100.csv", csv.to_owned()),
    ] {
        std::fs::write(folder.join(name), text).unwrap();
    }
}

/// A layout of two pipelines of two stages over that kind, with its problem.
fn plan(folder: &Path) {
    let memory = |share: f64| json!({"state_bytes": 1e8 * share, "optimizer_bytes": 1e8 * share, "activation_bytes": 1e7 * share, "recompute_bytes": 1e6});
    let curve = json!({"alpha-beta": {"latency_s": 1e-5, "bytes_per_s": 1e10}});
    let link = json!([{"from": 1, "to": 1, "curve": curve}]);
    let class = json!({"name": "block", "gradient_bytes": 1e8, "parameter_bytes": 1e8, "output_bytes": 1e6, "memory": [memory(1.0)]});
    let stage = |first: u32, end: u32| json!({"first_layer": first, "end_layer": end, "pool": 0, "tensor_parallel": 1, "replicas": 1, "recompute": false});
    let document = json!({
        "instance": {
            "degrees": [1], "classes": [class], "runs": [{"class": 0, "count": 6}],
            "pools": [{"kind": "CARD", "nodes": 2, "devices_per_node": 2, "memory_bytes": 1e10, "overhead_bytes": [1e9],
                "intra": link, "costs": [{"tensor_parallel": 1, "micro_batch": 1, "forward_s": [0.01], "backward_s": [0.02], "update_s": [0.001]}]}],
            "inter": [[link]], "global_batch": 16, "seq_len": 128,
            "rules": {"transfer": "overlapped", "exchange": "hierarchical", "exchange_overlap": 1.0, "update": "all-layers",
                "recompute": true, "shard_optimizer": false, "max_replicas": 1, "schedules": ["1f1b"]},
        },
        "layout": {"templates": [{"count": 2, "micro_batch": 1, "num_micro_batches": 8, "schedule": "1f1b", "stages": [stage(0, 2), stage(2, 6)]}], "shard_optimizer": false},
    });
    std::fs::write(folder.join("plan.json"), document.to_string()).unwrap();
}

#[test]
fn validate_prints_predicted_beside_measured() {
    let folder = tempfile::tempdir().unwrap();
    tables(folder.path());
    let printed = printed(&hgct(folder.path(), &["validate", ".", "--json"]));
    let rows = printed["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        for key in ["predicted_s", "measured_s", "error"] {
            assert!(row[key].is_number(), "{key} of {row}");
        }
    }
    assert!(printed["sets"][0]["plans"].is_u64(), "{printed}");
    assert_eq!(rows[0]["id"], "a/b");
    assert!(rows[0]["predicted_peak_bytes"].as_u64().unwrap() > 3_500_000_000);
    assert_eq!(rows[0]["measured_peak_bytes"], 4_000_000_000u64);
    assert!(rows[0]["published_s"].as_f64().unwrap() > 0.15);
    let table = hgct(folder.path(), &["validate", ".", "--cross-validate"]);
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(text.contains("a/b") && text.contains("plans that the fit has not seen"), "{text}");
}

#[test]
fn a_plan_is_made_from_tables() {
    let folder = tempfile::tempdir().unwrap();
    tables(folder.path());
    let plan = ["plan", "--tables", ".", "--model", "tiny", "--global-batch", "16", "--devices"];
    let printed = printed(&hgct(folder.path(), &[plan.as_slice(), &["CARD=4", "--json"]].concat()));
    assert!(printed["upper_bound"].as_f64() >= printed["iterations_per_second"].as_f64());
    let rows = printed["rows"].as_array().unwrap();
    assert!(!rows.is_empty() && rows.iter().all(|row| row["kind"] == "CARD"), "{rows:?}");
    refused(&hgct(folder.path(), &[plan.as_slice(), &["CART=4"]].concat()), "CARD");
    refused(
        &hgct(
            folder.path(),
            &["plan", "--tables", ".", "--model", "large", "--global-batch", "16", "--devices", "CARD=4"],
        ),
        "tiny",
    );
}

#[test]
fn validate_names_file_and_key_of_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    refused(&hgct(path, &["validate", "."]), "profiles.json");
    tables(path);
    std::fs::remove_file(path.join("measured_mixed.jsonl")).unwrap();
    assert!(hgct(path, &["validate", "."]).status.success());
    std::fs::remove_file(path.join("measured_a100.csv")).unwrap();
    refused(&hgct(path, &["validate", "."]), "no measured plans");
    let text = std::fs::read_to_string(path.join("network.json")).unwrap();
    tables(path);
    std::fs::write(path.join("network.json"), text.replace("40000000000.0", "\"much\"")).unwrap();
    refused(&hgct(path, &["validate", "."]), "nodes.CARD.mem_per_gpu");
    std::fs::write(path.join("network.json"), &text[..text.len() / 2]).unwrap();
    refused(&hgct(path, &["validate", "."]), "network.json, line 1");
}

#[test]
fn simulate_prints_limits_pictures_and_what_ifs() {
    let folder = tempfile::tempdir().unwrap();
    plan(folder.path());
    let args =
        ["simulate", "plan.json", "--json", "--svg", "a.svg", "--trace", "a.json", "--timeline", "t.json"];
    let usual = printed(&hgct(folder.path(), &args));
    let of = |value: &Value, key: &str| value[key].as_f64().unwrap();
    assert!(
        of(&usual, "roofline_s") <= of(&usual, "step_s") && of(&usual, "step_s") <= of(&usual, "serial_s")
    );
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    assert!(read("a.svg").starts_with("<svg") && read("a.svg").contains("CARD-0/0"));
    let trace: Value = serde_json::from_str(&read("a.json")).unwrap();
    assert!(trace["traceEvents"].as_array().unwrap().len() > 64);
    let timeline: Value = serde_json::from_str(&read("t.json")).unwrap();
    assert_eq!(
        (timeline["source"].as_str(), timeline["ranks"].as_array().unwrap().len()),
        (Some("predicted"), 4)
    );

    let slow = printed(&hgct(folder.path(), &["simulate", "plan.json", "--json", "--slow", "CARD-1/1=1.5"]));
    assert!(of(&slow, "step_s") > 1.3 * of(&slow, "unchanged_step_s"));
    // Replicas of a stage stand beside each other, so both pipelines have a part in each node of two.
    let lose = ["simulate", "plan.json", "--json", "--lose", "CARD-1"];
    refused(&hgct(folder.path(), &lose), "has to be made anew");
    let small = read("plan.json").replace("\"devices_per_node\":2,", "\"devices_per_node\":1,");
    std::fs::write(folder.path().join("plan.json"), small.replace("\"nodes\":2,", "\"nodes\":4,")).unwrap();
    let lost = printed(&hgct(folder.path(), &lose));
    assert_eq!((lost["pipelines"].as_u64(), lost["samples"].as_u64()), (Some(1), Some(16)));
    refused(&hgct(folder.path(), &["simulate", "plan.json", "--lose", "CARD-0,CARD-7"]), "CARD-0 to CARD-3");
    refused(
        &hgct(folder.path(), &["simulate", "plan.json", "--profile", "plan.json"]),
        "leave --profile out",
    );
    let text = hgct(folder.path(), &["simulate", "plan.json"]).stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(text.starts_with("step ") && text.contains("s to the last backward"), "{text}");
    refused(&hgct(folder.path(), &["simulate", "plan.json", "--slow", "CARD=-1"]), "DEVICE=FACTOR");
    std::fs::write(folder.path().join("plan.json"), "{}").unwrap();
    refused(&hgct(folder.path(), &["simulate", "plan.json"]), "plan.json");
}

#[test]
fn nobody_has_to_read_what_is_said() {
    let folder = tempfile::tempdir().unwrap();
    plan(folder.path());
    let unread = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        writer
    };
    let command = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hgct"));
        command.args(args).current_dir(folder.path());
        command
    };
    let output = command(&["export", "plan.json", "--to", "megatron"]).stdout(unread()).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let status = command(&["simulate", "none.json"]).stderr(unread()).status().unwrap();
    assert_eq!(status.code(), Some(2));
}

#[test]
fn export_writes_files_or_says_why_not() {
    let folder = tempfile::tempdir().unwrap();
    plan(folder.path());
    let megatron = hgct(folder.path(), &["export", "plan.json", "--to", "megatron"]);
    let text = String::from_utf8(megatron.stdout).unwrap();
    assert!(text.contains("--pipeline-model-parallel-layout \"Et|t*3,L\""), "{text}");
    assert!(
        hgct(folder.path(), &["export", "plan.json", "--to", "torchtitan", "--output", "out"])
            .status
            .success()
    );
    assert!(
        folder.path().join("out/schedule.csv").exists() && folder.path().join("out/torchtitan.toml").exists()
    );
    let rows = printed(&hgct(folder.path(), &["export", "plan.json", "--to", "torchtitan", "--json"]));
    let rows = rows["rows"].as_array().unwrap();
    let written = std::fs::read_to_string(folder.path().join("out/schedule.csv")).unwrap();
    assert!(rows.iter().any(|row| row["file"] == "schedule.csv" && row["text"] == written.as_str()));
    let uneven = std::fs::read_to_string(folder.path().join("plan.json"))
        .unwrap()
        .replace("\"count\":2", "\"count\":1");
    let twice = uneven.replace("\"templates\":[", "\"templates\":[{\"count\":1,\"micro_batch\":1,\"num_micro_batches\":8,\"schedule\":\"1f1b\",\"stages\":[{\"first_layer\":0,\"end_layer\":6,\"pool\":0,\"tensor_parallel\":1,\"replicas\":1,\"recompute\":false}]},");
    std::fs::write(folder.path().join("plan.json"), twice).unwrap();
    refused(
        &hgct(folder.path(), &["export", "plan.json", "--to", "megatron"]),
        "megatron cannot express this plan",
    );
    refused(&hgct(folder.path(), &["export", "plan.json", "--to", "word"]), "megatron");
}
