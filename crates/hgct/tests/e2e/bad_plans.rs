//! What `hgct plan` is given and cannot plan: exit code 2, one error that says what to do.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::planning::{CLUSTER, CONFIG, Documents};

/// The error of any call that must fail with exit code 2.
fn refused(documents: &Documents, args: &[&str]) -> String {
    let output = documents.hgct(args);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    error
}

#[test]
fn links_that_contradict_each_other_or_nothing_are_named() {
    let documents = Documents::new();
    let link = "[[link]]\nbetween = [\"fast\", \"slow\"]\nbytes_per_s = 10e9\n";
    let cases = [
        (
            link.to_owned() + &link.replace("10e9", "5e9"),
            "there twice, with 10000000000 bytes/s and 5000000000",
        ),
        (link.to_owned() + &link.replace("\"fast\", \"slow\"", "\"slow\", \"fast\""), "there twice"),
        (link.replace("slow", "slov"), "(did you mean `slow`?)"),
        (link.replace("10e9", "-1.0"), "`link.bytes_per_s between fast and slow` is -1"),
        (link.replace("10e9", "nan"), "must be a positive number"),
        (link.replace("10e9", "10e9\npath = \"carrier-pigeon\""), "carrier-pigeon"),
        (String::new(), "missing between fast and slow"),
    ];
    for (links, says) in cases {
        let error = documents.with(link, &links);
        assert!(error.contains(says) && error.contains("cluster.toml"), "{says}: {error}");
    }
}

#[test]
fn counts_and_names_of_groups_are_checked() {
    let documents = Documents::new();
    let cases = [
        ("devices = 4", "devices = 0", "`group.devices of fast` is 0, but must be at least 1"),
        ("nodes = 2", "nodes = -2", "line 5"),
        ("nics = 4", "nics = 0", "`group.nics of fast` is 0"),
        ("nic_bytes_per_s = 25e9", "nic_bytes_per_s = 0.0", "`group.nic_bytes_per_s of fast` is 0"),
        ("devices = 4", "devices = 4\nmemory_bytes = 80", "at least 1073741824"),
        ("name = \"slow\"", "name = \"fast\"", "\"fast\" twice"),
        ("nodes = 2", "nodes = 4000000", "at most 1048576"),
        ("nodes = 2", "noeds = 2", "did you mean `nodes`?"),
        ("\"a100-80\"", "\"A100\"", "a100-80"),
        ("\"a100-80\"", "\"h8000\"", "h800"),
        ("format = 1", "format = 2", "`format` is 2"),
        ("[[group]]", "[[group", "cluster.toml, line 2"),
    ];
    for (from, to, says) in cases {
        let error = documents.with(from, to);
        assert!(error.contains(says), "{to}: {error}");
        assert!(error.matches("line ").count() <= 1, "a line is told twice: {error}");
    }
}

#[test]
fn models_that_cannot_be_read_say_which_key() {
    let documents = Documents::new();
    let cases = [
        (CONFIG.replace("\"hidden_size\": 2048,", ""), "`hidden_size`"),
        (CONFIG.replace("2048,\n", "\"wide\",\n"), "`hidden_size` is \"wide\""),
        (CONFIG.replace("\"num_hidden_layers\": 22", "\"num_hidden_layers\": 0"), "`num_hidden_layers` is 0"),
        (CONFIG.replace("\"num_attention_heads\": 32", "\"num_attention_heads\": 31"), "num_attention_heads"),
        (CONFIG.replace("llama", "lama"), "did you mean `llama`?"),
        (CONFIG.replace("},", "}").replace('}', ""), "config.json, line"),
        ("[]".to_owned(), "must be a JSON object"),
    ];
    for (config, says) in cases {
        documents.put("config.json", &config);
        let error = documents.error("64", &[]);
        assert!(error.contains(says), "{says}: {error}");
        assert!(error.matches("line ").count() <= 1, "a line is told twice: {error}");
    }
}

#[test]
fn what_fits_nowhere_is_known_before_a_search() {
    let documents = Documents::new();
    documents.put("config.json", &CONFIG.replace("\"num_hidden_layers\": 22", "\"num_hidden_layers\": 2000"));
    let started = Instant::now();
    let error = documents.error("64", &[]);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    for part in ["the model fits nowhere", "GiB are missing", "more devices of", "times the memory"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    // One layer that is too wide for any card.
    let wide = CONFIG.replace("2048,\n", "2097152,\n").replace("5632", "8388608");
    documents.put("config.json", &wide);
    let error = documents.error("64", &[]);
    assert!(error.contains("alone needs") && error.contains("whatever the tensor parallelism"), "{error}");
}

#[test]
fn batches_name_the_nearest_that_work() {
    let documents = Documents::new();
    let batch = documents.error("7", &["--micro-batches", "4"]);
    assert!(batch.contains("the global batch is 7") && batch.contains("nearest that work: 4, 8"), "{batch}");
    assert!(documents.error("3", &["--micro-batches", "4"]).contains("must be among [1, 2]"));
    for bad in ["-1", "1.5", "many", "99999999999"] {
        assert!(documents.error_of(&["--global-batch", bad]).contains("--global-batch"), "{bad}");
    }
}

#[test]
fn options_that_name_nothing_are_refused_with_what_there_is() {
    let documents = Documents::new();
    let cases: [(&[&str], &str); 7] = [
        (&["--schedules", "zero-buble"], "zero-bubble"),
        (&["--precision", "fp8"], "must be bf16, f16 or f32"),
        (&["--mixed-tensor-parallel", "fast+fats"], "A+B of fast, slow"),
        (&["--time-limit", "-3"], "--time-limit is -3"),
        (&["--accelerators", "nowhere"], "nowhere"),
        (&["--seq-len", "4000000000"], "--seq-len is 4000000000"),
        (&["--cluster", "gone.toml"], "gone.toml"),
    ];
    for (more, says) in cases {
        let mut args = [&["--global-batch", "64"], more].concat();
        if more[0] != "--precision" {
            args.extend(["--precision", "f16"]);
        }
        let error = documents.error_of(&args);
        assert!(error.contains(says), "{more:?}: {error}");
    }
    for number in ["65536", "18446744073709551615"] {
        let error = refused(&documents, &["check", "--agents", number]);
        assert!(error.contains("--agents") && error.contains("0..=65535"), "{error}");
    }
    documents.json(&["-o", "plan.json"]);
    for (node, says) in [
        ("fast", "fast-0 to fast-1"),
        ("fast-0,fast-1,slow-0,slow-1", "every node that there is"),
        ("quick-0", "slow-0 to slow-1"),
    ] {
        let error = refused(&documents, &["plan", "--parent", "plan.json", "--lose", node]);
        assert!(error.contains(says), "{node}: {error}");
    }
    let mut plan: Value =
        serde_json::from_str(&std::fs::read_to_string(documents.path("plan.json")).unwrap()).unwrap();
    plan["layout"]["templates"][0]["stages"][0]["end_layer"] = 3.into();
    documents.put("broken.json", &plan.to_string());
    for command in [vec!["plan", "--compare", "plan.json", "broken.json"], vec!["simulate", "broken.json"]] {
        assert!(refused(&documents, &command).contains("broken.json"), "{command:?}");
    }
    assert_eq!(CLUSTER.matches("[[link]]").count(), 1);
}
