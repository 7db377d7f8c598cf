//! `hgct plan --model`: from documents alone to a plan, and bad input to one clear error.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

use crate::bad_input::documents;
use crate::support::{BINARY, Bench, put, root};

/// Two small groups, a folder to write to, and the arguments of a call that works.
pub(crate) struct Documents {
    folder: tempfile::TempDir,
}

pub(crate) const CLUSTER: &str = r#"format = 1
[[group]]
name = "fast"
kind = "a100-80"
nodes = 2
devices = 4
nics = 4
nic_bytes_per_s = 25e9
[[group]]
name = "slow"
kind = "v100-32"
nodes = 2
devices = 4
nics = 1
nic_bytes_per_s = 12.5e9
[[link]]
between = ["fast", "slow"]
bytes_per_s = 10e9
"#;

pub(crate) const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
  "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
  "max_position_embeddings": 2048}"#;

impl Documents {
    pub(crate) fn new() -> Self {
        let documents = Self { folder: tempfile::tempdir().unwrap() };
        documents.put("cluster.toml", CLUSTER);
        documents.put("config.json", CONFIG);
        documents
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn put(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// `hgct` in the folder of the documents.
    pub(crate) fn hgct(&self, args: &[&str]) -> Output {
        Command::new(BINARY).current_dir(self.folder.path()).args(args).output().unwrap()
    }

    fn plan(&self, batch: &str, more: &[&str]) -> Output {
        let model = ["plan", "--cluster", "cluster.toml", "--model", "config.json", "--global-batch", batch];
        let precision: &[&str] = if more.contains(&"--precision") { &[] } else { &["--precision", "f16"] };
        self.hgct(&[&model, precision, more].concat())
    }

    pub(crate) fn json(&self, more: &[&str]) -> Value {
        let output = self.plan("64", &[more, &["--json"]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The one error of a call that must fail with exit code 2.
    pub(crate) fn error(&self, batch: &str, more: &[&str]) -> String {
        let output = self.plan(batch, more);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(output.stdout.is_empty() && error.starts_with("hgct: "), "{error}");
        error
    }

    /// The same with all arguments beside cluster and model.
    pub(crate) fn error_of(&self, args: &[&str]) -> String {
        let cluster: &[&str] = if args.contains(&"--cluster") { &[] } else { &["--cluster", "cluster.toml"] };
        let output = self.hgct(&[&["plan"], cluster, &["--model", "config.json"], args].concat());
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        error
    }

    /// The error when one part of the cluster is replaced.
    pub(crate) fn with(&self, from: &str, to: &str) -> String {
        assert!(CLUSTER.contains(from), "{from}");
        self.put("cluster.toml", &CLUSTER.replacen(from, to, 1));
        let error = self.error("64", &[]);
        self.put("cluster.toml", CLUSTER);
        error
    }
}

#[test]
fn a_plan_from_documents_is_the_same_twice_and_says_what_was_asked() {
    let documents = Documents::new();
    let first = documents.json(&["-o", "a.json"]);
    let second = documents.json(&["-o", "b.json"]);
    assert_eq!(fs::read(documents.path("a.json")).unwrap(), fs::read(documents.path("b.json")).unwrap());
    assert_eq!(first["plan"], second["plan"]);
    for key in ["iterations_per_second", "upper_bound", "gap", "search_seconds"] {
        assert!(first[key].is_number(), "{key}: {}", first[key]);
    }
    assert!(first["upper_bound"].as_f64() >= first["iterations_per_second"].as_f64());
    assert!(!first["limited_by"].as_str().unwrap().is_empty());
    let interval: Vec<f64> = serde_json::from_value(first["interval_seconds"].clone()).unwrap();
    let step = first["iteration_seconds"].as_f64().unwrap();
    assert!(interval[0] < step && step < interval[1]);
    let stages = first["rows"].as_array().unwrap();
    for key in ["layers", "devices", "tensor_parallel", "micro_batch", "micro_batches", "memory_bytes"] {
        assert!(stages.iter().all(|stage| !stage[key].is_null()), "{key}");
    }
    // Nothing was made beside what was asked for: no folder of runs.
    let mut names: Vec<_> =
        fs::read_dir(documents.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["a.json", "b.json", "cluster.toml", "config.json"]);
}

#[test]
fn two_plans_are_compared() {
    let documents = Documents::new();
    documents.json(&["-o", "a.json"]);
    documents.json(&["-o", "b.json", "--micro-batches", "1"]);
    let compare = |[a, b]: [&str; 2]| documents.hgct(&["plan", "--compare", a, b]);
    let output = compare(["a.json", "b.json"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("iterations a second"), "{text}");
    let output = compare(["a.json", "config.json"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("config.json is no plan of `hgct plan --model`"), "{error}");
}

#[test]
fn a_lost_node_is_planned_around() {
    let documents = Documents::new();
    documents.json(&["-o", "a.json"]);
    let lose = |node: &str| {
        documents.hgct(&["plan", "--parent", "a.json", "--json", "-o", "b.json", "--lose", node])
    };
    let output = lose("fast-1");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let child: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(child["plan"]["parent"].is_string());
    assert!(!child["replanned"]["ways"].as_array().unwrap().is_empty());
    let number = |key: &str| child[key].as_f64().unwrap_or_else(|| panic!("{key}: {}", child[key]));
    let step = number("iteration_seconds");
    assert!(number("upper_bound") >= 1.0 / step && number("gap") < 1.0);
    let interval: [f64; 2] = serde_json::from_value(child["interval_seconds"].clone()).unwrap();
    assert!(interval[0] < step && step < interval[1]);
    let error = String::from_utf8(lose("fast-2").stderr).unwrap();
    assert!(
        error.contains("`--lose` is fast-2") && error.contains("fast-0 to fast-1, slow-0 to slow-1"),
        "{error}"
    );
    // The spare node of a plan that was made without it takes the lost one's place.
    documents.put("cluster.toml", &CLUSTER.replace("nodes = 2", "nodes = 1"));
    documents.json(&["-o", "small.json"]);
    let grown = fs::read_to_string(documents.path("small.json")).unwrap();
    documents.put("a.json", &grown.replace("\"nodes\": 1", "\"nodes\": 2"));
    let moved: Value = serde_json::from_slice(&lose("fast-0").stdout).unwrap();
    let ways = moved["replanned"]["ways"].as_array().unwrap();
    assert!(ways.iter().any(|way| way["name"] == "move"), "{ways:?}");
}

#[test]
fn what_a_call_would_leave_out_of_account_is_refused() {
    let documents = Documents::new();
    let job = ["job.toml", "--cluster", "cluster.toml", "--profile", "profile.json"];
    let model = ["--cluster", "cluster.toml", "--model", "config.json", "--global-batch", "64"];
    let parent = ["--parent", "a.json", "--lose", "fast-1"];
    let compare = ["--compare", "a.json", "b.json"];
    let tables = ["--tables", ".", "--devices", "A=4", "--model", "large", "--global-batch", "64"];
    let calls: [(&[&str], &[&str], &str); 14] = [
        (&job, &["--global-batch", "64"], "--global-batch"),
        (&job, &["--explain"], "--explain"),
        (&job, &["--precision", "f16"], "--precision"),
        (&job, &["--lose", "fast-1"], "--lose"),
        (&model, &["--lose", "fast-1"], "--lose"),
        (&model, &["--steps", "7"], "--steps"),
        (&model, &["--force"], "--force"),
        (&model, &["--agents", "2"], "--agents"),
        (&parent, &["--global-batch", "64"], "--global-batch"),
        (&parent, &["--cluster", "cluster.toml"], "--cluster"),
        (&compare, &["--time-limit", "1"], "--time-limit"),
        (&compare, &["-o", "c.json"], "--output"),
        (&tables, &["--precision", "f32"], "--precision"),
        (&[], &["--cluster", "cluster.toml"], "there is nothing to plan"),
    ];
    for (call, more, named) in calls {
        let output = documents.hgct(&[&["plan"], call, more].concat());
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{call:?} {more:?}: {error}");
        assert!(error.contains(named), "{call:?} {more:?}: {error}");
    }
}

#[test]
fn the_text_has_its_parts_and_reasons() {
    let output = Documents::new().plan("64", &["--explain"]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in ["Stages", "Devices", "Rejected", "What more would bring", "fast alone", "`hgct profile`"] {
        assert!(text.contains(part), "{part} is missing:\n{text}");
    }
}

#[test]
fn mistakes_in_a_cluster_are_named_with_what_was_meant() {
    let documents = Documents::new();
    let unknown = documents.with("\"v100-32\"", "\"v100\"");
    assert!(
        unknown.contains("`group.kind of slow` is \"v100\"") && unknown.contains("v100-16, v100-32"),
        "{unknown}"
    );
    let zero = documents.with("nodes = 2", "nodes = 0");
    assert!(zero.contains("`group.nodes of fast` is 0, but must be at least 1"), "{zero}");
    let missing = documents.with("[\"fast\", \"slow\"]", "[\"fast\", \"fast\"]");
    assert!(missing.contains("missing between fast and slow"), "{missing}");
    let faster = documents.with("bytes_per_s = 10e9", "bytes_per_s = 13e9");
    assert!(faster.contains("what the nics of a node of slow carry"), "{faster}");
    let mixed = documents.with("[[link]]", "[[node]]\nname = \"a\"\n[[link]]");
    assert!(mixed.contains("both [[node]] and [[group]]"), "{mixed}");
}

#[test]
fn batches_and_models_that_cannot_be_are_told_why() {
    let documents = Documents::new();
    let batch = documents.error("63", &["--micro-batches", "2,4"]);
    assert!(batch.contains("nearest that work: 62, 64"), "{batch}");
    assert!(documents.error("0", &[]).contains("--global-batch is 0"));
    assert!(documents.error("64", &["--micro-batches", "3"]).contains("must be among [1, 2, 4, 8, 16]"));
    assert!(documents.error("64", &["--seq-len", "0"]).contains("--seq-len is 0"));
    assert!(documents.error("64", &["--time-limit", "0"]).contains("--time-limit is 0"));
    let dtype = documents.error("64", &["--precision", "bf16"]);
    assert!(dtype.contains("group slow: the catalogue knows no rate of v100-32 in bf16"), "{dtype}");
    documents.put("config.json", &CONFIG.replace("22", "2000"));
    let large = documents.error("64", &[]);
    assert!(large.contains("the model fits nowhere") && large.contains("GiB are missing"), "{large}");
    assert!(large.contains("more devices of fast"), "{large}");
    documents.put("config.json", &CONFIG.replace("llama", "mamba"));
    assert!(documents.error("64", &[]).contains("`model_type` is \"mamba\""));
}

#[test]
fn an_accelerator_of_a_folder_is_planned_with() {
    let documents = Documents::new();
    let text = fs::read_to_string(root().join("accelerators/v100-32.toml")).unwrap();
    fs::create_dir(documents.path("more")).unwrap();
    let nova = text.replace("\"v100-32\"", "\"nova-9\"").replace("Tesla V100-SXM2-32GB", "Nova 9");
    documents.put("more/nova-9.toml", &nova);
    documents.put("cluster.toml", &CLUSTER.replace("v100-32", "nova-9"));
    assert!(documents.error("64", &[]).contains("\"nova-9\""));
    assert!(documents.json(&["--accelerators", "more"])["iterations_per_second"].is_number());
}

#[test]
fn the_example_is_what_it_says() {
    let read = |name: &str| fs::read_to_string(root().join("examples/planning").join(name)).unwrap();
    let cluster = hgct_core::topology::Topology::from_toml("cluster.toml", &read("cluster.toml")).unwrap();
    assert_eq!((cluster.num_devices(), cluster.groups.len()), (1024, 4));
    let model = hgct_core::architecture::Architecture::from_config_json("config.json", &read("config.json"));
    assert_eq!(model.unwrap().num_parameters() / 1_000_000_000, 100);
}

/// Every key of an object and of the objects in it that people's programs read.
fn keys(of: &Value) -> Vec<String> {
    of.as_object().unwrap().keys().cloned().collect()
}

#[test]
fn a_job_and_a_model_are_answered_in_the_same_form() {
    let of_model = Documents::new().json(&[]);
    let bench = Bench::with_table("", 8, 0);
    let (cluster, profile) = documents(1 << 30);
    put(&bench.path("cluster.toml"), &cluster.to_toml(), 0o644);
    put(&bench.path("profile.json"), &hgct_core::canonical::encode(&profile), 0o644);
    let plan = ["plan", "job.toml", "--cluster", "cluster.toml", "--profile", "profile.json"];
    let output = Command::new(BINARY).current_dir(bench.path("")).args(plan).arg("--json").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let of_job: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(keys(&of_model), keys(&of_job));
    let mut row = keys(&of_job["rows"][0]);
    row.retain(|key| key != "device");
    assert_eq!(keys(&of_model["rows"][0]), row);
    assert_eq!(of_job["rows"][0]["layers"][0], 0);
    assert!(of_job["upper_bound"].as_f64() >= of_job["iterations_per_second"].as_f64());
    for of in [&of_model, &of_job] {
        let own = of["iterations_per_second"].as_f64().unwrap();
        for row in of["why"]["rejected"].as_array().unwrap() {
            let rate = row["iterations_per_second"].as_f64();
            assert!(
                rate.is_none_or(|rate| (rate / own - 1.0).abs() > 1e-9),
                "the plan itself is rejected: {row}"
            );
        }
    }
    // In text both name the first and the last layer.
    let output = Command::new(BINARY).current_dir(bench.path("")).args(plan).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let last = of_job["rows"].as_array().unwrap().last().unwrap()["layers"][1].as_u64().unwrap() - 1;
    assert!(text.contains(&format!("–{last}")) && !text.contains(".."), "{text}");
}

#[test]
fn alike_stages_are_one_row_and_comparisons_have_names() {
    let documents = Documents::new();
    let deep = ["--micro-batches", "1", "--schedules", "1f1b", "--seq-len", "2048"];
    documents.put("config.json", &CONFIG.replace("\"num_hidden_layers\": 22", "\"num_hidden_layers\": 440"));
    documents.json(&[deep.as_slice(), &["-o", "a.json"]].concat());
    documents.json(&["-o", "b.json"]);
    let plan: Value = serde_json::from_str(&fs::read_to_string(documents.path("a.json")).unwrap()).unwrap();
    let stages: usize = plan["layout"]["templates"]
        .as_array()
        .unwrap()
        .iter()
        .map(|template| template["stages"].as_array().unwrap().len())
        .sum();
    let text = String::from_utf8(documents.plan("64", &deep).stdout).unwrap();
    let table = text.split("Stages\n").nth(1).unwrap().split("\n\n").next().unwrap();
    assert!(stages > 4 && table.lines().count() <= stages, "{stages} stages:\n{text}");
    assert!(table.contains(" ×") && table.contains(" each"), "{text}");
    let output = documents.hgct(&["plan", "--json", "--compare", "a.json", "b.json"]);
    let compared: Value = serde_json::from_slice(&output.stdout).unwrap();
    for (row, name) in compared["rows"].as_array().unwrap().iter().zip(["first", "second"]) {
        assert_eq!(row["plan"], name);
        assert!(row["iterations_per_second"].is_number() && row["devices"][0]["kind"].is_string(), "{row}");
    }
}

#[test]
fn a_time_limit_is_kept_and_proves_a_gap() {
    let of = |name: &str| root().join("examples/planning").join(name);
    for more in [&[][..], &["--explain"]] {
        let started = std::time::Instant::now();
        let mut command = Command::new(BINARY);
        command.args(["plan", "--json", "--time-limit", "1", "--global-batch", "1024", "--seq-len", "4096"]);
        command.args(more).arg("--cluster").arg(of("cluster.toml")).arg("--model").arg(of("config.json"));
        let output = command.output().unwrap();
        let taken = started.elapsed();
        if output.status.code() == Some(2) {
            // A build without optimisation may find nothing in time, and says so.
            assert!(String::from_utf8_lossy(&output.stderr).contains("larger --time-limit"));
        } else {
            let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert!(answer["gap"].as_f64().unwrap() < 1.0 && answer["upper_bound"].is_number());
            // Found, or named among what was not searched for.
            let of = |key: &str| answer["why"][key].as_array().map_or(0, Vec::len);
            assert!(more.is_empty() || of("rejected") + of("shadow_prices") + of("left_out") >= 10);
        }
        assert!(taken < std::time::Duration::from_secs(8), "{more:?}: {taken:?}");
    }
}
