#![allow(clippy::unwrap_used, reason = "tests")]

use serde_json::{Value, json};

use super::*;
use crate::instance::{check_instance, price};

/// Two kinds of nodes of two devices, four layers, degrees 1 and 2, micro-batches 1 and 2.
pub(crate) fn profiles() -> Value {
    let layers = |scale: f64| {
        let row = |forward: f64, backward: f64| json!([forward * scale, backward * scale, 0.001]);
        json!({"0": row(0.001, 0.0001), "1": row(0.01, 0.02), "2": row(0.01, 0.02), "3": row(0.004, 0.008)})
    };
    let kind = |scale: f64| {
        json!({"1": {"1": layers(scale), "2": layers(scale * 0.6)},
               "2": {"1": layers(scale * 1.8), "2": layers(scale), "4": layers(0.5)}})
    };
    let floats = |degree: f64| {
        let row = |parameters: f64, kept: f64| {
            json!({"params_floats": parameters / degree, "act_output_floats": 1e6, "act_input_floats": 1e6,
                   "act_mem_floats": kept / degree})
        };
        json!({"0": row(4e6, 1e6), "1": row(1e7, 4e7), "2": row(1e7, 4e7), "3": row(4e6, 8e6)})
    };
    json!({"tiny": {
        "config": {"sequence_length": 128, "hidden_size": 64, "vocab_size": 1000, "heads": 4},
        "layer_seconds": {"FAST": kind(1.0), "SLOW": kind(3.0), "BLANK": {"1": {"1": layers(0.0)}}},
        "layer_floats": {"1": floats(1.0), "2": floats(2.0), "4": floats(4.0)},
    }})
}

pub(crate) fn network() -> Value {
    let node = |memory: f64| json!({"gpus_per_node": 2, "mem_per_gpu": memory});
    let link = |rate: f64| json!([[0.0, 0.1 * rate, rate], rate * 2e9]);
    let peers = |rate: f64| json!({"FAST": {"1": link(rate), "2": link(rate)}, "SLOW": {"1": link(rate), "2": link(rate)}});
    json!({
        "nodes": {"FAST": node(4e10), "SLOW": node(2e10), "BLANK": node(2e10), "zone": "somewhere"},
        "intra_node": {"FAST": {"2": link(100.0)}, "SLOW": {"2": link(20.0)}},
        "inter_node": {"FAST": {"1": peers(10.0), "2": peers(10.0)}, "SLOW": {"1": peers(2.0), "2": peers(2.0)}},
    })
}

pub(crate) fn tables() -> Tables {
    Tables::parse("profiles.json", &profiles().to_string(), "network.json", &network().to_string()).unwrap()
}

fn counts(text: &str) -> Vec<DeviceCount> {
    parse_device_counts(text).unwrap()
}

#[test]
fn tables_become_a_problem_without_faults() {
    let instance = tables().instance("tiny", &counts("FAST=4,SLOW=8"), 32).unwrap();
    assert_eq!(check_instance(&instance), []);
    assert_eq!((instance.num_layers(), instance.num_devices()), (4, 12));
    // Layers 1 and 2 are alike; a degree of 4 does not fit into a node of 2.
    assert_eq!(instance.runs.iter().map(|run| run.count).collect::<Vec<_>>(), [1, 2, 1]);
    assert_eq!(instance.degrees, [1, 2]);
    assert!(instance.pools.iter().all(|pool| pool.costs.len() == 4));
}

#[test]
fn a_plan_by_hand_has_the_published_price() {
    use crate::instance::{Layout, Schedule, Stage, Template};
    let instance = tables().instance("tiny", &counts("FAST=4"), 8).unwrap();
    let stage = Stage {
        first_layer: 0,
        end_layer: 4,
        pool: 0,
        tensor_parallel: 2,
        expert_parallel: 1,
        replicas: 1,
        recompute: false,
    };
    let template = Template {
        count: 2,
        micro_batch: 1,
        num_micro_batches: 4,
        schedule: Schedule::OneForwardOneBackward,
        stages: vec![stage],
    };
    let priced = price(&instance, &Layout { templates: vec![template], shard_optimizer: false });
    // 73.1 ms of all layers at degree 1, 0.6 of it at degree 2, four times; one update.
    let pipeline = 4.0 * 0.6 * (0.0011 + 0.03 + 0.03 + 0.012);
    assert!((priced.pipeline_s - pipeline).abs() < 1e-12, "{}", priced.pipeline_s);
    // Two owners of 28e6 parameters of 4 bytes, halved: two halves at the curve's rate for them.
    let half: f64 = 28e6 * 4.0 / 2.0 / 2.0;
    let exchange = 2.0 * half / ((1.0 * (half / 1e6).log2() + 10.0) * 1e9);
    assert!((priced.exchange_s - exchange).abs() < 1e-12, "{}", priced.exchange_s);
}

#[test]
fn what_was_not_measured_is_told() {
    let tables = tables();
    let error = tables.instance("tiny", &counts("BLANK=2"), 8).unwrap_err().to_string();
    assert!(error.contains("BLANK") && error.contains("FAST, SLOW"), "{error}");
    let error = tables.instance("tinny", &counts("FAST=2"), 8).unwrap_err().to_string();
    assert!(error.contains("nearest: tiny"), "{error}");
    let error = tables.instance("tiny", &counts("FASTER=2"), 8).unwrap_err().to_string();
    assert!(error.contains("nearest: FAST"), "{error}");
    let error = tables.instance("tiny", &counts("FAST=3"), 8).unwrap_err().to_string();
    assert!(error.contains("a multiple of 2"), "{error}");
}

#[test]
fn device_counts_that_say_nothing_are_refused() {
    for bad in ["", "A", "A=", "A=0", "A=-1", "=4", "A=1,A=2", "A=1,,B=2", "A=1e3", "A=9999999999"] {
        let error = parse_device_counts(bad).unwrap_err().to_string();
        assert!(error.contains("--devices"), "{bad}: {error}");
    }
    assert_eq!(counts("A100-40=32, V100-16=96")[1], DeviceCount { kind: "V100-16".into(), count: 96 });
}

/// Every value of a document, replaced by something else, is an error that names file and key, or
/// does not matter; nothing panics.
#[test]
fn any_wrong_value_names_file_and_key() {
    fn pointers(value: &Value, at: &str, all: &mut Vec<String>) {
        all.push(at.to_owned());
        match value {
            Value::Object(map) => {
                map.iter().for_each(|(key, value)| pointers(value, &format!("{at}/{key}"), all));
            }
            Value::Array(items) => {
                items
                    .iter()
                    .enumerate()
                    .for_each(|(key, value)| pointers(value, &format!("{at}/{key}"), all));
            }
            _ => {}
        }
    }
    let (profiles, network) = (profiles(), network());
    for first in [true, false] {
        let whole = if first { &profiles } else { &network };
        let mut all = Vec::new();
        pointers(whole, "", &mut all);
        for pointer in all {
            for wrong in [json!("x"), json!(-1.0), json!({"x": 1}), json!([]), json!(null), json!(1e300)] {
                let mut changed = whole.clone();
                *changed.pointer_mut(&pointer).unwrap() = wrong;
                let (a, b) = if first { (&changed, &network) } else { (&profiles, &changed) };
                let parsed = Tables::parse("p.json", &a.to_string(), "n.json", &b.to_string());
                match parsed {
                    Ok(tables) => {
                        let _ = tables.instance("tiny", &counts("FAST=4,SLOW=8"), 32);
                    }
                    Err(error) => {
                        let text = error.to_string();
                        assert!(text.contains(if first { "p.json" } else { "n.json" }), "{pointer}: {text}");
                    }
                }
            }
        }
    }
    let mut changed = profiles.clone();
    changed["tiny"]["layer_seconds"]["FAST"]["1"]["2"]["1"] = json!([1, 2]);
    let error = Tables::parse("p.json", &changed.to_string(), "n.json", &network.to_string())
        .unwrap_err()
        .to_string();
    assert!(error.contains("p.json") && error.contains("tiny.layer_seconds.FAST.1.2.1"), "{error}");
}

#[test]
fn measured_plans_are_read() {
    let row = json!({"id": "a", "model": "tiny", "micro_batch": 2, "global_batch": 8, "stages": [
        {"layers": [0, 1], "replicas": [{"gpu": "FAST", "tp": 2, "count": 1}, {"gpu": "SLOW", "tp": 2, "count": 1}]},
        {"layers": [2, 3], "replicas": [{"gpu": "FAST", "tp": 2, "count": 2}]}],
        "iteration_s": 1.5, "grad_sync_s": 0.1, "max_memory_bytes": 1e9, "precision": "fp32"});
    let rows = parse_measured_layers("m.jsonl", &format!("\n{row}\n"), &tables()).unwrap();
    assert_eq!((rows[0].num_pipelines(), rows[0].num_micro_batches()), (2, 2));
    for (pointer, wrong, says) in [
        ("/model", json!("none"), "none"),
        ("/stages/1/layers/0", json!(3), "stages.1.layers"),
        ("/stages/1/layers/1", json!(2), "not all layers"),
        ("/stages/1/replicas/0/count", json!(1), "replicas"),
        ("/global_batch", json!(9), "a multiple of 4"),
        ("/micro_batch", json!(0), "micro_batch"),
        ("/stages/0/replicas/0/count", json!(100_000), "at most"),
    ] {
        let mut changed = row.clone();
        *changed.pointer_mut(pointer).unwrap() = wrong;
        let error =
            parse_measured_layers("m.jsonl", &changed.to_string(), &tables()).unwrap_err().to_string();
        assert!(error.contains(says), "{pointer}: {error}");
    }

    let csv = "# GPUs,global batch,micro batch,hidden size,attention heads,# layers,sequence length,tensor parallelism,data parallelism,pipeline parallelism,iteration time (ms)\n8,64,2,1024,16,24,2048,2,2,2,1500.5\n";
    let rows = parse_measured_transformers("a.csv", csv).unwrap();
    assert!((rows[0].iteration_s - 1.5005).abs() < 1e-12);
    for (from, to) in
        [("1500.5", "soon"), ("8,64", "8,63"), (",24,", ",23,"), ("1500.5", "0"), ("global", "glbal")]
    {
        assert!(parse_measured_transformers("a.csv", &csv.replace(from, to)).is_err(), "{from} → {to}");
    }
}
