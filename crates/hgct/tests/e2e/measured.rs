//! A plan of `hgct plan --model` from measured devices is one that `hgct train` runs.

use std::fs;

use serde_json::Value;

use crate::support::{BINARY, Bench, machine, put};

#[test]
fn an_answer_from_a_profile_is_trained_and_takes_about_what_it_says() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["torch", "jax"], 8, 0) else { return };
    let (code, said) = bench.finish(&["train", "job.toml", "--run", "first", "--until", "3"]);
    assert_eq!(code, 0, "{said}");
    let of_run = |name: &str| bench.run_folder("first").join(name).to_string_lossy().into_owned();
    let (cluster, profile) = (of_run("cluster.toml"), of_run("profile.json"));
    let plan = ["plan", "--cluster", &cluster, "--profile", &profile, "--model", "config.json"];
    let more = ["--global-batch", "16", "-o", "plan.json", "--json"];
    let mut command = bench.command();
    let output = command.args(plan).args(more).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = answer["executed_seconds"].as_f64().unwrap();
    assert_eq!(answer["basis"], "profile");

    let (code, said) = bench.finish(&["train", "job.toml", "--run", "second", "--plan", "plan.json"]);
    assert_eq!(code, 0, "{said}");
    // The same learning under another plan, and about the predicted time; others use the machine too.
    let (first, second) = (bench.losses("first"), bench.losses("second"));
    assert_eq!(second.len(), 8);
    for (step, loss) in &first {
        assert!((loss - second[step]).abs() < 1e-3 * loss, "step {step}: {loss} and {}", second[step]);
    }
    let mut seconds: Vec<f64> = fs::read_to_string(bench.run_folder("second").join("metrics.jsonl"))
        .unwrap()
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok()?["step_seconds"].as_f64())
        .collect();
    seconds.sort_by(f64::total_cmp);
    let usual = seconds[seconds.len() / 2];
    assert!(expected / 3.0 < usual && usual < expected * 3.0, "{expected} s predicted, {usual} s measured");
    let job = bench.run_folder("second").join("plan.json");
    let plan: Value = serde_json::from_str(&fs::read_to_string(job).unwrap()).unwrap();
    assert_ne!(plan["job"], answer["plan"]["plan"]["job"], "it is the job's plan now");
}

#[test]
fn plans_that_no_worker_runs_are_refused_before_anything_starts() {
    let bench = Bench::with_table("", 8, 0);
    put(
        &bench.path("cluster.toml"),
        "format = 1\n[[group]]\nname = \"a\"\nkind = \"a100-80\"\nnodes = 1\ndevices = 2\nnics = 1\nnic_bytes_per_s = 1e9\n",
        0o644,
    );
    let plan = |more: &[&str]| {
        let mut command = std::process::Command::new(BINARY);
        command.current_dir(bench.folder.path()).args(["plan", "--cluster", "cluster.toml", "--model"]);
        command.args(["config.json", "--global-batch", "16", "-o", "plan.json"]).args(more);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let refused = |says: &str| {
        let (code, said) = bench.finish(&["train", "job.toml", "--plan", "plan.json"]);
        assert!(code == 2 && said.contains(says), "{said}");
        assert!(!bench.path("hgct/runs").exists(), "a run was begun");
    };
    plan(&[]);
    let text = fs::read_to_string(bench.path("plan.json")).unwrap();
    refused("names no devices");
    let mut answer: Value = serde_json::from_str(&text).unwrap();
    let stage = &mut answer["layout"]["templates"][0]["stages"][0];
    let parallel = if stage["tensor_parallel"] == 1 { 2 } else { 1 };
    assert_eq!(parallel, 2, "so small a model needs no tensor parallelism: {stage}");
    let template = &mut answer["layout"]["templates"][0];
    template["stages"][0]["tensor_parallel"] = 2.into();
    template["count"] = 1.into();
    template["num_micro_batches"] = (16 / template["micro_batch"].as_u64().unwrap()).into();
    put(&bench.path("plan.json"), &answer.to_string(), 0o644);
    refused("hgct train does not run tensor-parallel stages yet");
}
