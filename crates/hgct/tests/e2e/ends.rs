//! How a run ends: by a stopped or stalled worker, by a death at its start, by the user, by losses
//! that are not finite. And what others make of its result.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use hgct_data::TokenFile;
use serde_json::Value;

use crate::support::{Bench, Running, all_gone, family, machine, put, root, send, skip, worker_of};

/// From a verdict to the end of every process; and what a busy machine may take on top.
const END: Duration = Duration::from_secs(5);
const BUSY: Duration = Duration::from_secs(1);

/// A run of jax (3 layers) before mlx (3 layers), started.
fn start(bench: &Bench, run: &str, more: &[&str]) -> Running {
    let plan = bench.plan("plan.json", &[("local/jax:0", 3), ("local/mlx:0", 3)]);
    let mut command = bench.command();
    command.args(["train", "job.toml", "--run", run, "--plan"]).arg(plan).args(more);
    Running::start(command, bench.path("train.log"))
}

fn wait_for_steps(bench: &Bench, run: &str, train: &mut Running, steps: usize) {
    train.wait_for("steps", |_| (bench.losses(run).len() >= steps).then_some(()));
}

/// The line that says why a run failed.
fn why(said: &str) -> &str {
    said.lines().find(|line| line.contains("the run failed")).unwrap_or_else(|| panic!("no reason: {said}"))
}

#[test]
fn a_stopped_worker_is_named_with_the_cause_and_everybody_goes() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["jax", "mlx"], 100_000, 0) else { return };
    let mut train = start(&bench, "stopped", &[]);
    wait_for_steps(&bench, "stopped", &mut train, 3);
    let processes = family(train.child.id());
    let stopped = Instant::now();
    send(worker_of(train.child.id(), "mlx").unwrap(), "-STOP");
    let (code, said) = train.finish(Duration::from_secs(30));
    // Three seconds without a beat are the verdict.
    let after = stopped.elapsed();
    assert_eq!(code, 1, "{said}");
    assert!(after < Duration::from_secs(3) + END + BUSY, "{after:?}: {said}");
    assert!(after > Duration::from_secs(2), "nobody can know after {after:?}: {said}");
    let why = why(&said);
    assert!(why.contains("worker local/mlx:0 on node local"), "{why}");
    assert!(why.contains("is stalled: no beat for 3.") && why.contains("does not run"), "{why}");
    assert!(!why.contains("jax"), "{why}");
    all_gone(&processes, Duration::from_secs(1));
}

/// Stops the first thread of a process, alone, while it computes: the others go on. Lets go of it when
/// the process ends.
fn stop_first_thread(pid: u32) -> Result<std::thread::JoinHandle<()>, String> {
    let (told, hear) = std::sync::mpsc::channel();
    let holder = std::thread::spawn(move || {
        let pid = pid as libc::pid_t;
        let null = std::ptr::null_mut::<libc::c_void>();
        let request = |what: libc::c_uint| {
            // SAFETY: none of the requests used here reads or writes memory of this process.
            match unsafe { libc::ptrace(what, pid, null, null) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error().to_string()),
            }
        };
        let wait = || {
            let mut status = 0;
            // SAFETY: the pointer is to a live local.
            let found = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
            found == pid && libc::WIFSTOPPED(status)
        };
        if let Err(error) = request(libc::PTRACE_SEIZE) {
            let _ = told.send(Err(format!("no thread may be stopped here: {error}")));
            return;
        }
        loop {
            if request(libc::PTRACE_INTERRUPT).is_err() || !wait() {
                let _ = told.send(Err("the process is gone".into()));
                return;
            }
            // Inside of a system call it waits for somebody; outside it computes.
            let call = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
            if call.starts_with("-1 ") {
                break;
            }
            let _ = request(libc::PTRACE_CONT);
            std::thread::sleep(Duration::from_micros(700));
        }
        let _ = told.send(Ok(()));
        // Its parent hears of its end only once this tracer has.
        while wait() {}
    });
    hear.recv().unwrap_or_else(|_| Err("the thread that stops it ended".into()))?;
    Ok(holder)
}

#[test]
fn a_worker_that_beats_but_completes_nothing_is_stalled() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["jax", "mlx"], 100_000, 0) else { return };
    // Without a prediction the warming time is what an action may take.
    let mut train = start(&bench, "stalled", &["--warming", "12"]);
    wait_for_steps(&bench, "stalled", &mut train, 3);
    let processes = family(train.child.id());
    let holder = match stop_first_thread(worker_of(train.child.id(), "mlx").unwrap()) {
        Ok(holder) => holder,
        Err(reason) => return skip(&reason),
    };
    let stopped = Instant::now();
    let (code, said) = train.finish(Duration::from_secs(60));
    let after = stopped.elapsed();
    holder.join().unwrap();
    assert_eq!(code, 1, "{said}");
    assert!(after < Duration::from_secs(13) + END + BUSY, "{after:?}: {said}");
    let why = why(&said);
    assert!(why.contains("worker local/mlx:0 on node local (rank 1"), "{why}");
    assert!(why.contains("is stalled: in step") && why.contains("12.0 s are allowed"), "{why}");
    all_gone(&processes, Duration::from_secs(1));
}

#[test]
fn a_death_at_the_start_names_the_worker_and_the_cause() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["jax", "mlx"], 100_000, 0) else { return };
    // The check is kept from here on, so that workers are started for training alone.
    let plan = bench.plan("plan.json", &[("local/jax:0", 3), ("local/mlx:0", 3)]);
    let plan = plan.to_str().unwrap();
    let (code, said) = bench.finish(&["train", "job.toml", "--plan", plan, "--run", "first", "--until", "1"]);
    assert_eq!(code, 0, "{said}");

    let kill = |run: &str, engine: &str, when: &dyn Fn() -> bool| {
        let mut train = start(&bench, run, &[]);
        let of = train.child.id();
        let victim = train.wait_for("worker", |_| worker_of(of, engine).filter(|_| when()));
        let processes = family(of);
        let killed = Instant::now();
        send(victim, "-KILL");
        let (code, said) = train.finish(Duration::from_secs(30));
        let after = killed.elapsed();
        assert!(after < END + BUSY, "{run}: {after:?}: {said}");
        all_gone(&processes, Duration::from_secs(1));
        (code, said)
    };
    // While its framework is imported.
    let (code, said) = kill("importing", "jax", &|| true);
    assert_eq!(code, 2, "{said}");
    let last = said.lines().find(|line| line.contains("the plan needs")).unwrap();
    assert!(last.contains("local/jax:0") && last.contains("signal 9 (SIGKILL)"), "{last}");
    assert!(!last.contains("mlx"), "{last}");
    // While its stages are loaded.
    let begun = bench.run_folder("loading").join("metrics.jsonl");
    let (code, said) = kill("loading", "mlx", &|| begun.exists());
    assert_eq!(code, 1, "{said}");
    assert!(why(&said).contains("worker local/mlx:0 on node local"), "{said}");
    assert!(why(&said).contains("died: signal 9 (SIGKILL)") && !why(&said).contains("jax"), "{said}");
}

#[test]
fn ctrl_c_stops_after_the_step_with_a_checkpoint_and_twice_at_once() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["jax", "mlx"], 100_000, 0) else { return };
    let mut train = start(&bench, "once", &[]);
    wait_for_steps(&bench, "once", &mut train, 3);
    send(train.child.id(), "-INT");
    let (code, said) = train.finish(Duration::from_secs(30));
    assert_eq!(code, 0, "{said}");
    let steps = bench.losses("once").len();
    let (code, said) = bench.finish(&["ckpt", "inspect", "once", "--json"]);
    assert_eq!(code, 0, "{said}");
    assert_eq!(serde_json::from_str::<Value>(&said).unwrap()["step"].as_u64(), Some(steps as u64));

    // A step takes more than ten seconds, so only the second one can end the run at once.
    let mut train = start(&bench, "twice", &["--no-shared-memory", "--wire-delay-ms", "2000"]);
    train.wait_for("training", |_| bench.run_folder("twice").join("metrics.jsonl").exists().then_some(()));
    wait_for_steps(&bench, "twice", &mut train, 1);
    let processes = family(train.child.id());
    send(train.child.id(), "-INT");
    train.wait_for("first stop", |train| train.said().contains("once more stops at once").then_some(()));
    let at = Instant::now();
    send(train.child.id(), "-INT");
    let (code, said) = train.finish(Duration::from_secs(30));
    assert_eq!(code, 130, "{said}");
    assert!(at.elapsed() < END, "{:?}: {said}", at.elapsed());
    all_gone(&processes, Duration::from_secs(1));
}

#[test]
fn losses_that_are_not_finite_end_the_run_and_keep_the_good_checkpoint() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["mlx"], 12, 4) else { return };
    let plan = bench.plan("plan.json", &[("local/mlx:0", 6)]);
    let train = ["train", "job.toml", "--plan", plan.to_str().unwrap()];
    let (code, said) = bench.finish(&[&train[..], &["--run", "one", "--until", "8"]].concat());
    assert_eq!(code, 0, "{said}");
    let good = bench.losses("one");

    let job = fs::read_to_string(bench.path("job.toml")).unwrap();
    let wild =
        job.replace("learning_rate = 1e-3", "learning_rate = 1e30").replace("steps = 12", "steps = 40");
    put(&bench.path("job.toml"), &wild, 0o644);
    let resume = [&train[..], &["--resume", "one"]].concat();
    let (code, said) = bench.finish(&resume);
    assert_eq!(code, 1, "{said}");
    assert!(why(&said).contains("not finite in 3 steps in a row"), "{said}");
    assert!(
        said.contains("was skipped on all ranks") && said.contains("last good checkpoint is kept"),
        "{said}"
    );
    let (code, said) = bench.finish(&["ckpt", "inspect", "one", "--json"]);
    assert_eq!(code, 0, "{said}");
    assert_eq!(serde_json::from_str::<Value>(&said).unwrap()["step"].as_u64(), Some(8));

    // With the old rate it goes on from there as if nothing had been.
    put(&bench.path("job.toml"), &job, 0o644);
    let (code, said) = bench.finish(&resume);
    assert_eq!(code, 0, "{said}");
    let losses = bench.losses("one");
    assert!((0..8).all(|step| losses[&step].to_bits() == good[&step].to_bits()), "{losses:?}");
    assert!((8..12).all(|step| losses[&step].is_finite() && losses[&step] < 6.5), "{losses:?}");
}

/// Mean loss in nats of the samples in FOLDER/samples.json, as others compute it from an export.
const OTHERS: &str = r#"
import importlib.util, json, sys
from pathlib import Path
import torch
folder, tests = Path(sys.argv[1]), sys.argv[2]
def load(path):
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    found = {}
    for name, row in header.items():
        assert row["dtype"] == "F32", row
        first, end = (begin + offset for offset in row["data_offsets"])
        found[name] = torch.frombuffer(bytearray(data[first:end]), dtype=torch.float32).reshape(row["shape"])
    return found
config = json.loads((folder / "model/config.json").read_text())
config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
samples = json.loads((folder / "samples.json").read_text())
inputs, labels = (torch.tensor([row[i] for row in samples]) for i in (0, 1))
spec = importlib.util.spec_from_file_location("export", tests)
export = importlib.util.module_from_spec(spec)
spec.loader.exec_module(export)
logits = export.logits(config, load(folder / "model/model.safetensors"), inputs)
by = "a plain model"
if importlib.util.find_spec("transformers"):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        found = model(inputs).logits.double()
    error = ((found - logits).abs().max() / logits.abs().max()).item()
    assert error < 1e-5, error
    by = "transformers"
loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
print(json.dumps({"loss": loss.item(), "by": by}))
"#;

#[test]
fn others_load_an_export_and_find_the_loss_that_the_run_found() {
    let _machine = machine();
    let Some(bench) = Bench::new(&["torch", "mlx"], 12, 0) else { return };
    let plan = bench.plan("plan.json", &[("local/torch:0", 2), ("local/mlx:0", 4)]);
    let train = ["train", "job.toml", "--plan", plan.to_str().unwrap(), "--run", "one"];
    let (code, said) = bench.finish(&train);
    assert_eq!(code, 0, "{said}");
    let model = bench.path("model");
    let export = ["ckpt", "export", "one", "--to", "hf", "--output", model.to_str().unwrap(), "--json"];
    let (code, said) = bench.finish(&export);
    assert_eq!(code, 0, "{said}");
    let exported: Value = serde_json::from_str(&said).unwrap();
    let rows = exported["rows"].as_array().unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(model.join(file).is_file() && rows.iter().any(|row| row["file"] == file), "{file}: {said}");
    }
    // Nothing is written over.
    let before = fs::read(model.join("model.safetensors")).unwrap();
    let (code, said) = bench.finish(&export);
    assert_eq!(code, 2, "{said}");
    assert!(fs::read(model.join("model.safetensors")).unwrap() == before);

    let data = fs::read_dir(bench.path("hgct/cache/data")).unwrap();
    let data = data.map(|entry| entry.unwrap().path()).find(|path| path.join("meta.json").is_file()).unwrap();
    let held_out = hgct_data::prepare::Prepared::open(&data).unwrap().held_out_path();
    let file = TokenFile::open(&held_out).unwrap();
    let all = file.samples(32).unwrap();
    let samples: Vec<_> = (0..16).map(|index| all.get(index % all.len()).unwrap()).collect();
    put(&bench.path("samples.json"), &serde_json::to_string(&samples).unwrap(), 0o644);
    let transformers = root().join(".hgct/env/export/bin/python");
    let torch = root().join(".hgct/env/torch/bin/python");
    let python = if transformers.exists() { transformers } else { torch };
    let found = others(&python, bench.folder.path());
    let metrics = fs::read_to_string(bench.run_folder("one").join("metrics.jsonl")).unwrap();
    let mut rows = metrics.lines().rev().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let last = rows.find(|row| row["type"] == "evaluation").unwrap();
    assert_eq!(last["tokens"], 16 * 32);
    let (ours, theirs) = (last["loss"].as_f64().unwrap(), found["loss"].as_f64().unwrap());
    println!("the run says {ours}, {} says {theirs}", found["by"]);
    assert!((ours / theirs - 1.0).abs() < 1e-5, "the run says {ours}, {found}");
}

fn others(python: &Path, folder: &Path) -> Value {
    let mut command = Command::new(python);
    command.args(["-c", OTHERS]).arg(folder).arg(root().join("python/tests/test_export.py"));
    let output = command.env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    serde_json::from_str(said.lines().last().unwrap()).unwrap()
}
