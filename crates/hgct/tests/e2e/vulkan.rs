//! The worker without Python: alone, beside others, and on a host that has nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::hosts::{address, network};
use crate::support::{BINARY, Bench, Running, TOKEN, machine, put, root, skip};

const PROGRAM: &str = "hgct-worker-burn";
const ENGINES: [&str; 4] = ["torch", "jax", "paddle", "mlx"];

/// The worker that `make vulkan` has built; `None`, said aloud, where it was not run.
fn program() -> Option<PathBuf> {
    let path = root().join(".hgct/bin").join(PROGRAM);
    if !path.exists() {
        skip("the worker without Python is not built: run `make vulkan`");
        return None;
    }
    Some(path)
}

fn install(folder: &Path, program: &Path) {
    fs::create_dir_all(folder.join("bin")).unwrap();
    std::os::unix::fs::symlink(program, folder.join("bin").join(PROGRAM)).unwrap();
}

/// A bench whose workspace has the worker and these engines.
fn bench(engines: &[&str], steps: u32, checkpoint_every: u32) -> Option<Bench> {
    let program = program()?;
    let bench = Bench::new(engines, steps, checkpoint_every)?;
    if engines.is_empty() {
        // Nothing of Python: no table at all.
        fs::remove_file(bench.path("hgct/environments.toml")).unwrap();
    }
    install(&bench.path("hgct"), &program);
    Some(bench)
}

fn train(bench: &Bench, run: &str, plan: Option<&Path>, more: &[&str]) {
    let plan = plan.map(|plan| plan.to_str().unwrap().to_owned());
    let mut args = vec!["train", "job.toml", "--run", run];
    if let Some(plan) = &plan {
        args.extend(["--plan", plan]);
    }
    args.extend(more);
    let mut command = bench.command();
    command.args(&args);
    let (code, said) = Running::start(command, bench.path("train.log")).finish(Duration::from_secs(240));
    assert_eq!(code, 0, "{run}: {said}");
}

#[test]
fn vulkan_alone_is_found_checked_planned_and_trained_with_nothing_configured() {
    let _machine = machine();
    let Some(bench) = bench(&[], 6, 3) else { return };
    let (code, listed) = bench.finish(&["devices"]);
    assert!(code == 0 && listed.contains("local/burn:0"), "{listed}");
    train(&bench, "alone", None, &[]);
    let losses = bench.losses("alone");
    assert!(losses.len() == 6 && losses[&5] < losses[&0], "{losses:?}");
}

#[test]
fn vulkan_and_torch_train_one_job_together() {
    let _machine = machine();
    let Some(bench) = bench(&["torch"], 6, 0) else { return };
    let job = fs::read_to_string(bench.path("job.toml")).unwrap();
    put(&bench.path("job.toml"), &format!("{job}[policy]\nmin_kinds = 'all'\n"), 0o644);
    train(&bench, "both", None, &[]);
    let plan = fs::read_to_string(bench.run_folder("both").join("plan.json")).unwrap();
    assert!(plan.contains("local/burn:0") && plan.contains("local/torch:0"), "{plan}");
    let losses = bench.losses("both");
    assert!(losses.len() == 6 && losses[&5] < losses[&0], "{losses:?}");
}

#[test]
fn five_kinds_lose_what_one_loses_and_layers_move_between_burn_and_torch() {
    let _machine = machine();
    let Some(bench) = bench(&ENGINES, 50, 0) else { return };
    // A software adapter feels each kernel: few and large micro-batches.
    let plan = |name: &str, stages: &[(&str, u32)]| bench.plan_of(name, stages, 8);
    let torch = plan("torch.json", &[("local/torch:0", 6)]);
    train(&bench, "one", Some(&torch), &[]);
    let five = plan(
        "five.json",
        &[
            ("local/torch:0", 2),
            ("local/jax:0", 1),
            ("local/burn:0", 1),
            ("local/paddle:0", 1),
            ("local/mlx:0", 1),
        ],
    );
    train(&bench, "five", Some(&five), &[]);
    let (one, five) = (bench.losses("one"), bench.losses("five"));
    assert_eq!(one.len(), 50);
    same(&five, &one, 50);
    // All layers move to Burn, and away from it.
    let burn = plan("burn.json", &[("local/burn:0", 6)]);
    train(&bench, "moved", Some(&torch), &["--until", "5"]);
    for (plan, until) in [(&burn, "7"), (&torch, "9")] {
        let mut command = bench.command();
        command.args(["train", "job.toml", "--resume", "moved", "--until", until, "--plan"]).arg(plan);
        let (code, said) = Running::start(command, bench.path("moved.log")).finish(Duration::from_secs(120));
        assert_eq!(code, 0, "{said}");
    }
    same(&bench.losses("moved"), &one, 9);
}

/// The same losses within 1e-4, so many of them.
fn same(losses: &BTreeMap<u64, f64>, others: &BTreeMap<u64, f64>, steps: usize) {
    assert_eq!(losses.len(), steps);
    for (step, loss) in losses {
        let apart = (others[step] - loss).abs() / loss;
        assert!(apart < 1e-4, "step {step}: {loss} and {}", others[step]);
    }
}

#[test]
fn a_host_without_python_joins_with_two_binaries() {
    let _machine = machine();
    let Some(program) = program() else { return };
    let Some(bench) = Bench::new(&["mlx"], 6, 0) else { return };
    let [middle, east, _west] = match network() {
        Ok(network) => network,
        Err(reason) => return skip(&reason),
    };
    // Two programs in one folder, which is also all that the host's PATH has.
    let host = tempfile::tempdir().unwrap();
    fs::create_dir(host.path().join("bin")).unwrap();
    for (from, name) in [(PathBuf::from(BINARY), "hgct"), (program, PROGRAM)] {
        fs::copy(from, host.path().join("bin").join(name)).unwrap();
    }
    put(&host.path().join("token"), TOKEN, 0o600);
    let plan = bench.plan("plan.json", &[("local/mlx:0", 3), ("east/burn:0", 3)]);

    let mut command = middle.enter(BINARY);
    command.arg("--dir").arg(bench.path("hgct")).arg("train").arg(bench.path("job.toml"));
    command.args(["--agents", "1", "--listen", "10.77.0.1:0", "--run", "joined", "--plan"]).arg(&plan);
    command.arg("--token-file").arg(bench.path("token"));
    let mut train = Running::start(command, bench.path("train.log"));
    let join = address(&mut train);

    let mut command = east.enter("env");
    command
        .arg("-i")
        .arg(format!("PATH={}", host.path().join("bin").display()))
        .arg(host.path().join("bin/hgct"));
    command.arg("--dir").arg(host.path().join("state")).args(["agent", "--join", &join, "--name", "east"]);
    command.args(["--listen", "10.77.0.2", "--token-file"]).arg(host.path().join("token"));
    let agent = Running::start(command, host.path().join("agent.log"));

    let (code, said) = train.finish(Duration::from_secs(200));
    assert_eq!(code, 0, "{said}\n{}", agent.said());
    assert_eq!(bench.losses("joined").len(), 6, "{said}");
}

#[test]
fn a_worker_that_is_killed_by_its_driver_ends_the_run_with_its_name() {
    let _machine = machine();
    let Some(bench) = bench(&[], 4000, 0) else { return };
    let plan = bench.plan("burn.json", &[("local/burn:0", 6)]);
    let mut command = bench.command();
    command.args(["train", "job.toml", "--run", "crash", "--plan"]).arg(&plan);
    let mut train = Running::start(command, bench.path("train.log"));
    train.wait_for("a step", |_| (!bench.losses("crash").is_empty()).then_some(()));
    let worker = crate::support::family(train.child.id())
        .into_iter()
        .find(|pid| {
            // The kernel keeps 15 letters of a name.
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == &PROGRAM[..15])
        })
        .unwrap();
    // Rust looks at the first, which at a real fault comes again at once.
    let deadline = Instant::now() + Duration::from_secs(20);
    while Command::new("kill").args(["-SEGV", &worker.to_string()]).output().unwrap().status.success() {
        assert!(Instant::now() < deadline, "it lives on");
        std::thread::sleep(Duration::from_millis(20));
    }
    let (code, said) = train.finish(Duration::from_secs(60));
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("local/burn:0") && said.contains("SIGSEGV"), "{said}");
}
