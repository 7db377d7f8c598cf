//! Whole runs of the real binary over the real engines: every plan learns the same, a run goes on
//! after any death, bad input is told and harms nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hgct_core::cluster::Grant;
use hgct_core::ids::{DeviceId, Kind, NodeId, Rank};
use hgct_core::model::ModelSpec;
use hgct_core::plan::{PlanBuilder, PlanRank};
use serde_json::Value;

const BINARY: &str = env!("CARGO_BIN_EXE_hgct");
const ENGINES: [&str; 4] = ["torch", "jax", "paddle", "mlx"];
const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256,
  "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}"#;

/// One pipeline: micro-batch, micro-batches, (rank, layers) of each stage.
type PipelineShape<'a> = (u32, u32, &'a [(u32, u32)]);

/// Runs share two cores: one test at a time.
static MACHINE: Mutex<()> = Mutex::new(());

fn machine() -> MutexGuard<'static, ()> {
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder with a job, and the workspace that all tests share, so that devices are checked once.
struct Bench {
    folder: tempfile::TempDir,
    workspace: PathBuf,
    /// Of a whole run at most.
    patience: Duration,
    /// Of each device.
    cpu_millicores: u32,
}

impl Bench {
    /// `None`, said aloud, where the engines are not installed.
    fn new(steps: u32, checkpoint_every: u32) -> Option<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
        let table = std::fs::read_to_string(root.join(".hgct/environments.toml")).unwrap_or_default();
        let ready = |name: &&str| {
            table.contains(&format!("name = \"{name}\"")) && !table.contains("wheel_hash = \"\"")
        };
        if let Some(missing) = ENGINES.iter().find(|name| !ready(name)) {
            // Past the test runner, which swallows what a passing test prints.
            let reason =
                format!("SKIPPED: the environment of {missing} is not installed: run `make set-up`\n");
            let _ = std::io::Write::write_all(&mut std::io::stderr(), reason.as_bytes());
            assert!(std::env::var_os("HGCT_FORBID_SKIP").is_none(), "a test was skipped");
            return None;
        }
        let workspace = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hgct");
        std::fs::create_dir_all(&workspace).unwrap();
        std::fs::write(workspace.join("environments.toml"), table).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), CONFIG).unwrap();
        let job = format!(
            "name = 'test'\n[model]\nconfig = 'config.json'\n[data]\npaths = ['{0}/crates/hgct-core/src', '{0}/crates/hgct-worker/src']\nheld_out = 0.05\n\
             [recipe]\nseed = 3\nsteps = {steps}\nglobal_batch = 16\nseq_len = 64\nlearning_rate = 1e-3\nwarmup_steps = 10\n\
             evaluate_samples = 16\ncheckpoint_every = {checkpoint_every}\n",
            root.display()
        );
        std::fs::write(folder.path().join("job.toml"), job).unwrap();
        let patience = Duration::from_secs(240 + u64::from(steps));
        Some(Self { folder, workspace, patience, cpu_millicores: 300 })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run_folder(&self, run: &str) -> PathBuf {
        self.workspace.join("runs").join(run)
    }

    /// A run's id that no other run of the shared workspace has.
    fn id(name: &str) -> String {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        format!("{name}-{}-{}", std::process::id(), now.as_nanos())
    }

    fn plan(&self, name: &str, engines: &[&str], pipelines: &[PipelineShape<'_>]) -> PathBuf {
        self.plan_with(name, engines, |mut builder| {
            for (micro_batch, number, stages) in pipelines {
                let stages: Vec<(Rank, u32)> =
                    stages.iter().map(|(rank, layers)| (Rank(*rank), *layers)).collect();
                builder = builder.pipeline(*micro_batch, *number, &stages);
            }
            builder
        })
    }

    /// A plan on these engines with what `shape` adds.
    fn plan_with(
        &self,
        name: &str,
        engines: &[&str],
        shape: impl FnOnce(PlanBuilder) -> PlanBuilder,
    ) -> PathBuf {
        let model = ModelSpec::from_config_json("config.json", CONFIG).unwrap();
        let rank = |engine: &&str| PlanRank {
            device: DeviceId::new(format!("local/{engine}:0")).unwrap(),
            kind: Kind::new(format!("cpu/{engine}")).unwrap(),
            node: NodeId::new("local").unwrap(),
            grant: Grant {
                cpu_millicores: self.cpu_millicores,
                cores: vec![],
                threads: 1,
                memory_bytes: 1 << 30,
            },
        };
        let builder = shape(PlanBuilder::new(model, 64, 16).ranks(engines.iter().map(rank)));
        let path = self.path(name);
        std::fs::write(&path, hgct_core::canonical::encode(&builder.build().unwrap())).unwrap();
        path
    }

    /// `hgct train` under a plan, started.
    fn start(&self, run: &str, plan: &Path, more: &[&str]) -> Child {
        let log = std::fs::File::create(self.path(&format!("{run}.log"))).unwrap();
        Command::new(BINARY)
            .arg("--dir")
            .arg(&self.workspace)
            .arg("train")
            .arg(self.path("job.toml"))
            .arg("--plan")
            .arg(plan)
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    /// The same to its end; the exit code and what it said.
    fn train(&self, run: &str, plan: &Path, more: &[&str]) -> (i32, String) {
        let mut child = self.start(run, plan, more);
        let code = wait(&mut child, self.patience);
        (code, std::fs::read_to_string(self.path(&format!("{run}.log"))).unwrap())
    }

    /// Losses by step; a step that was done again counts as it was done last.
    fn losses(&self, run: &str) -> BTreeMap<u64, f64> {
        let text = std::fs::read_to_string(self.run_folder(run).join("metrics.jsonl")).unwrap_or_default();
        let rows = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        rows.filter(|row| row["type"] == "step")
            .filter_map(|row| Some((row["step"].as_u64()?, row["loss"].as_f64()?)))
            .collect()
    }

    /// Whether a checkpoint was committed: a folder without a manifest is none.
    fn has_checkpoint(&self, run: &str) -> bool {
        let folders = std::fs::read_dir(self.run_folder(run).join("checkpoints"));
        folders.is_ok_and(|mut folders| {
            folders.any(|folder| folder.unwrap().path().join("manifest.json").exists())
        })
    }

    /// SHA-256 of every shard of the newest checkpoint.
    fn shards(&self, run: &str) -> Vec<String> {
        let folder = self.run_folder(run).join("checkpoints");
        let mut steps: Vec<PathBuf> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        steps.sort();
        let text = std::fs::read_to_string(steps.last().unwrap().join("manifest.json")).unwrap();
        let manifest: Value = serde_json::from_str(&text).unwrap();
        manifest["shards"]
            .as_array()
            .unwrap()
            .iter()
            .map(|shard| shard["sha256"].as_str().unwrap().to_owned())
            .collect()
    }
}

/// Waits for the end of a process, which is killed at the deadline.
fn wait(child: &mut Child, within: Duration) -> i32 {
    let deadline = Instant::now() + within;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().unwrap_or(-1);
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            return -2;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// All processes below one, with their command lines.
fn descendants(of: u32) -> Vec<(u32, String)> {
    let mut parents: BTreeMap<u32, u32> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((_, fields)) = stat.rsplit_once(')') else { continue };
        let mut fields = fields.split_whitespace();
        if fields.next() != Some("Z")
            && let Some(parent) = fields.next().and_then(|field| field.parse().ok())
        {
            parents.insert(pid, parent);
        }
    }
    let mut found = vec![of];
    let mut at = 0;
    while at < found.len() {
        let parent = found[at];
        found.extend(parents.iter().filter(|(_, of)| **of == parent).map(|(pid, _)| *pid));
        at += 1;
    }
    let command = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " ")
    };
    found[1..].iter().map(|pid| (*pid, command(pid))).collect()
}

fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").args([name, &pid.to_string()]).status().unwrap().success());
}

fn assert_same(a: &BTreeMap<u64, f64>, b: &BTreeMap<u64, f64>, steps: u64, what: &str) {
    for step in 0..steps {
        let (a, b) = (a[&step], b[&step]);
        assert!((a / b - 1.0).abs() < 1e-4, "{what}, step {step}: {a} against {b}");
    }
}

#[test]
fn every_plan_of_the_four_engines_learns_the_same_and_so_does_a_resume() {
    let _machine = machine();
    let Some(bench) = Bench::new(50, 0) else { return };
    let pipeline = bench.plan("pipeline.json", &ENGINES, &[(2, 8, &[(0, 2), (1, 2), (2, 1), (3, 1)])]);
    let whole: [&[(u32, u32)]; 4] = [&[(0, 6)], &[(1, 6)], &[(2, 6)], &[(3, 6)]];
    let data = bench.plan(
        "data.json",
        &ENGINES,
        &[(2, 3, whole[0]), (2, 2, whole[1]), (2, 2, whole[2]), (1, 2, whole[3])],
    );
    let run = |name: &str, plan: &Path| {
        let id = Bench::id(name);
        let (code, log) = bench.train(&id, plan, &["--run", &id]);
        assert_eq!(code, 0, "{name}:\n{log}");
        id
    };
    // The first run checks the devices; after that nothing but training takes time.
    let first = run("data", &data);
    let reference = bench.losses(&first);
    assert_eq!(reference.len(), 50);
    assert!(reference[&49] < reference[&0] - 0.5, "it does not learn: {reference:?}");

    assert_same(&bench.losses(&run("pipeline", &pipeline)), &reference, 50, "four-kind pipeline");

    let again = run("data-again", &data);
    assert_eq!(bench.shards(&again), bench.shards(&first), "the same plan twice gives the same bits");

    // Each kind alone, side by side: each is held to its own grant.
    let alone: Vec<(String, Child)> = ENGINES
        .iter()
        .map(|engine| {
            let plan = bench.plan(&format!("{engine}.json"), &[engine], &[(4, 4, &[(0, 6)])]);
            let id = Bench::id(engine);
            let child = bench.start(&id, &plan, &["--run", &id]);
            (id, child)
        })
        .collect();
    for (engine, (id, mut child)) in ENGINES.iter().zip(alone) {
        let code = wait(&mut child, Duration::from_secs(240));
        let log = std::fs::read_to_string(bench.path(&format!("{id}.log"))).unwrap();
        assert_eq!(code, 0, "{engine} alone:\n{log}");
        assert_same(&bench.losses(&id), &reference, 50, &format!("{engine} alone"));
    }

    // 20 steps as a pipeline of two frameworks, then the rest data-parallel over the two others.
    let two = bench.plan("two.json", &["jax", "mlx"], &[(4, 4, &[(0, 3), (1, 3)])]);
    let others = bench.plan("others.json", &["paddle", "torch"], &[(2, 3, &[(0, 6)]), (2, 5, &[(1, 6)])]);
    let id = Bench::id("resumed");
    let (code, log) = bench.train(&id, &two, &["--run", &id, "--until", "20"]);
    assert_eq!(code, 0, "{log}");
    assert_eq!(bench.losses(&id).len(), 20);
    let (code, log) = bench.train(&id, &others, &["--resume", &id]);
    assert_eq!(code, 0, "{log}");
    assert_same(&bench.losses(&id), &reference, 50, "resumed under another plan");
}

#[test]
fn a_run_goes_on_after_the_death_of_any_process() {
    let _machine = machine();
    let kills: u64 = std::env::var("HGCT_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(20);
    let steps = 12 * (kills as u32 + 1);
    let Some(mut bench) = Bench::new(steps, 4) else { return };
    bench.cpu_millicores = 900;
    let plan = bench.plan("two.json", &["jax", "mlx"], &[(4, 4, &[(0, 3), (1, 3)])]);

    let (id, begun) = (Bench::id("killed"), Instant::now());
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    for kill in 0..kills {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let checkpoint = bench.has_checkpoint(&id);
        let how = if checkpoint { ["--resume", &id] } else { ["--run", &id] };
        if !checkpoint {
            // A run that died before its first checkpoint begins anew.
            let _ = std::fs::remove_dir_all(bench.run_folder(&id));
        }
        let before = bench.losses(&id).len();
        let mut child = bench.start(&id, &plan, &how);
        // Wait for some steps of this life, then for a random part of a step.
        let metrics = bench.run_folder(&id).join("metrics.jsonl");
        let lines =
            || std::fs::read_to_string(&metrics).map_or(0, |text| text.matches("\"type\":\"step\"").count());
        let wanted = lines() + 2 + (random >> 60) as usize % 8;
        let deadline = Instant::now() + Duration::from_secs(60);
        while lines() < wanted && child.try_wait().unwrap().is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        let all = descendants(child.id());
        let of = |text: &str| {
            all.iter().filter(|(_, command)| command.contains(text)).map(|(pid, _)| *pid).collect::<Vec<_>>()
        };
        let (agents, workers) = (of(" agent "), [of("/env/jax/"), of("/env/mlx/")].concat());
        let log = || std::fs::read_to_string(bench.path(&format!("{id}.log"))).unwrap();
        assert!(
            agents.len() == 1 && workers.len() == 2,
            "kill {kill} after {before} steps: {all:?}\n{}",
            log()
        );
        std::thread::sleep(Duration::from_micros((random >> 20) % 60_000));
        let index = (random >> 40) as usize % 4;
        let victim = [child.id(), agents[0], workers[0], workers[1]][index];
        let killed = Instant::now();
        signal(victim, "-KILL");
        // Who dies is seen at once: five seconds to the end, and one for a busy machine.
        let code = wait(&mut child, Duration::from_secs(6));
        if victim == child.id() {
            assert_eq!(code, -1);
        } else {
            let log = std::fs::read_to_string(bench.path(&format!("{id}.log"))).unwrap();
            assert_eq!(code, 1, "kill {kill}: {log}");
            let (who, cause) = [
                ("the agent of node local", "is lost"),
                ("worker local/jax:0 on node local", "died: signal 9 (SIGKILL)"),
                ("worker local/mlx:0 on node local", "died: signal 9 (SIGKILL)"),
            ][index - 1];
            let why = log.lines().find(|line| line.contains("the run failed")).unwrap_or_default();
            assert!(why.contains(&format!("failed: {who}")) && why.contains(cause), "kill {kill}: {log}");
        }
        if (kill + 1) % 50 == 0 {
            let steps = bench.losses(&id).len();
            let said = format!("{} deaths, {steps} steps, {} s\n", kill + 1, begun.elapsed().as_secs());
            let _ = std::io::Write::write_all(&mut std::io::stderr(), said.as_bytes());
        }
        while all.iter().any(|(pid, _)| is_alive(*pid)) {
            let left = all.iter().filter(|(pid, _)| is_alive(*pid)).collect::<Vec<_>>();
            assert!(killed.elapsed() < Duration::from_secs(6), "kill {kill}: these live on: {left:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let until = bench.losses(&id).len() as u64 + 10;
    assert!(until <= u64::from(steps), "{until} of {steps} steps");
    let end = until.to_string();
    let (code, log) = bench.train(&id, &plan, &["--resume", &id, "--until", &end]);
    assert_eq!(code, 0, "{log}");
    let unbroken = Bench::id("unbroken");
    let (code, log) = bench.train(&unbroken, &plan, &["--run", &unbroken, "--until", &end]);
    assert_eq!(code, 0, "{log}");
    // Every step was done, each with the samples that are its own: the losses are those of a run
    // that nobody disturbed, and so are the parameters, bit for bit.
    assert_eq!(bench.losses(&unbroken).len() as u64, until);
    assert_same(&bench.losses(&id), &bench.losses(&unbroken), until, "killed and resumed");
    assert_eq!(bench.shards(&id), bench.shards(&unbroken));
}

#[test]
fn a_stop_saves_and_what_is_not_finite_is_skipped_by_all() {
    let _machine = machine();
    let Some(bench) = Bench::new(400, 0) else { return };
    let plan = bench.plan("two.json", &["jax", "mlx"], &[(4, 4, &[(0, 3), (1, 3)])]);
    let id = Bench::id("stopped");
    let mut child = bench.start(&id, &plan, &["--run", &id]);
    let deadline = Instant::now() + Duration::from_secs(90);
    while bench.losses(&id).len() < 3 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(child.id(), "-TERM");
    assert_eq!(wait(&mut child, Duration::from_secs(20)), 0);
    let losses = bench.losses(&id);
    assert!((3..400).contains(&losses.len()), "{losses:?}");
    let inspected = Command::new(BINARY)
        .arg("--dir")
        .arg(&bench.workspace)
        .args(["ckpt", "inspect", &id, "--json"])
        .output()
        .unwrap();
    assert!(inspected.status.success());
    let summary: Value = serde_json::from_slice(&inspected.stdout).unwrap();
    assert_eq!(summary["step"].as_u64(), Some(losses.len() as u64));

    let job = std::fs::read_to_string(bench.path("job.toml")).unwrap();
    std::fs::write(bench.path("job.toml"), job.replace("learning_rate = 1e-3", "learning_rate = 1e30"))
        .unwrap();
    let id = Bench::id("not-finite");
    let (code, log) = bench.train(&id, &plan, &["--run", &id]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("not finite in 3 steps in a row"), "{log}");
    assert!(log.contains("was skipped on all ranks"), "{log}");
}

/// Medians over a run's steps under a plan, every message `delay` milliseconds late: milliseconds a
/// step, and exposed communication of each rank.
fn with_late_wire(bench: &Bench, name: &str, plan: &Path, delay: &str) -> (f64, Vec<f64>) {
    let id = Bench::id(name);
    let (code, log) = bench.train(&id, plan, &["--run", &id, "--wire-delay-ms", delay]);
    assert_eq!(code, 0, "{log}");
    let text = std::fs::read_to_string(bench.run_folder(&id).join("metrics.jsonl")).unwrap();
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps: Vec<&Value> = rows.iter().filter(|row| row["type"] == "step").collect();
    let median = |of: &dyn Fn(&Value) -> f64| {
        let mut values: Vec<f64> = steps.iter().map(|row| 1e3 * of(row)).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let ranks = steps[0]["devices"].as_array().unwrap().len();
    let exposed = |rank: usize| {
        median(&|row: &Value| row["devices"][rank]["exposed_communication_seconds"].as_f64().unwrap())
    };
    (median(&|row: &Value| row["step_seconds"].as_f64().unwrap()), (0..ranks).map(exposed).collect())
}

#[test]
fn a_wire_50_ms_late_hides_behind_compute() {
    let _machine = machine();
    let Some(bench) = Bench::new(12, 0) else { return };
    // The first rank sets the pace and updates everything; the second's gradients and scalars are
    // there before it is done, and the second has its new parameters long before it is needed again.
    let plan = bench.plan_with("slack.json", &["torch", "jax"], |builder| {
        builder.pipeline(1, 14, &[(Rank(0), 6)]).pipeline(1, 2, &[(Rank(1), 6)]).owner_weights(vec![1.0, 0.0])
    });
    let (plain, _) = with_late_wire(&bench, "slack", &plan, "0");
    let (late, exposed) = with_late_wire(&bench, "slack-late", &plan, "50");
    println!("a step takes {plain:.0} ms, {late:.0} ms on a wire 50 ms late; exposed {exposed:.0?} ms");
    assert!(exposed[0] < 50.0, "{exposed:?} ms of communication are exposed");
    // Gradient, norm and parameters would be three ways one after another.
    assert!(late - plain < 100.0, "{plain} ms became {late} ms");
}

#[test]
fn stages_that_run_ahead_wait_for_a_late_wire_at_the_ends_of_a_step_alone() {
    let _machine = machine();
    let Some(bench) = Bench::new(12, 0) else { return };
    let plan = |name: &str, run_ahead: u32| {
        bench.plan_with(name, &["torch", "jax"], |builder| {
            builder.pipeline(1, 16, &[(Rank(0), 3), (Rank(1), 3)]).run_ahead(run_ahead)
        })
    };
    let (plain, _) = with_late_wire(&bench, "plain", &plan("plain.json", 0), "0");
    let (waiting, _) = with_late_wire(&bench, "waiting", &plan("waiting.json", 0), "50");
    let (ahead, _) = with_late_wire(&bench, "ahead", &plan("ahead.json", 15), "50");
    // 16 micro-batches go there and back: 1,600 ms if each were waited for by itself. In plain 1F1B
    // two are in flight; with all in flight a step waits for the first activation, the last
    // gradient and the norm.
    println!(
        "a step takes {plain:.0} ms; with every message 50 ms late {waiting:.0} ms, ahead {ahead:.0} ms"
    );
    assert!(ahead - plain < 250.0, "{plain} ms became {ahead} ms");
    assert!(ahead < waiting, "running ahead did not help: {waiting} ms, {ahead} ms");
}

#[test]
fn bad_input_is_told_with_exit_code_2_and_nothing_is_written() {
    let _machine = machine();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("config.json"), CONFIG).unwrap();
    std::fs::write(path("text.txt"), "a few words").unwrap();
    let job = "name = 'x'\n[model]\nconfig = 'config.json'\n[data]\npaths = ['text.txt']\n[recipe]\nsteps = 2\nglobal_batch = 4\nseq_len = 16\nlearning_rate = 1e-3\n";
    let fails = |text: &str, args: &[&str], wanted: &[&str]| {
        std::fs::write(path("job.toml"), text).unwrap();
        let output = Command::new(BINARY)
            .arg("--dir")
            .arg(path("hgct"))
            .args(args)
            .current_dir(folder.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        for part in wanted {
            assert!(said.contains(part), "{args:?}: {part:?} is not in {said:?}");
        }
    };
    let train = ["train", "job.toml"];
    fails(
        &job.replace("steps =", "stpes ="),
        &train,
        &["job.toml, line 7", "unknown key `stpes`", "did you mean `steps`?"],
    );
    fails(
        &job.replace("seq_len = 16", "seq_len = 0"),
        &train,
        &["`recipe.seq_len` is 0, but must be at least 1"],
    );
    fails(
        &job.replace("seq_len = 16", "seq_len = 65"),
        &train,
        &["must be at most max_position_embeddings = 64"],
    );
    fails(&job.replace("'config.json'", "'none.json'"), &train, &["none.json"]);
    fails(job, &["train", "job.toml", "--resume", "nobody"], &["there is no run \"nobody\""]);
    fails(job, &["report", "nobody"], &["nobody"]);
    fails(job, &["ckpt", "inspect", "nobody"], &["nobody"]);
    fails(&job.replace("text.txt", "empty.txt"), &["data", "job.toml"], &["empty.txt"]);
    std::fs::write(path("empty.txt"), "").unwrap();
    fails(&job.replace("text.txt", "empty.txt"), &["data", "job.toml"], &["empty.txt"]);
    std::fs::write(path("binary.txt"), [b'a', 0, 255, 7]).unwrap();
    fails(&job.replace("text.txt", "binary.txt"), &["data", "job.toml"], &["binary.txt"]);
    assert!(!path("hgct/runs").exists(), "a run was begun");
}
