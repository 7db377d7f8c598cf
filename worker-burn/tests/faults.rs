//! What a driver or an adapter does wrong is a clear error, and nothing hangs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use hgct_core::model::{ModelSpec, RopeScaling};
use hgct_core::plan::StageId;
use hgct_worker::engine::{BackwardPart, Edge, Engine, Lease, StageLoad};
use hgct_worker_burn::{BurnEngine, adapter};

const PROGRAM: &str = env!("CARGO_BIN_EXE_hgct-worker-burn");

fn model(vocab_size: u32) -> ModelSpec {
    ModelSpec {
        vocab_size,
        hidden_size: 64,
        intermediate_size: 80,
        num_layers: 1,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::Default,
        tie_embeddings: false,
        max_position: 64,
        initializer_range: 0.02,
    }
}

fn engine() -> BurnEngine {
    let adapters = adapter::list();
    let first = adapters.first().expect("there is no Vulkan driver: run `make vulkan`");
    BurnEngine::open(&first.device_string).unwrap()
}

fn load(engine: &mut BurnEngine, vocab_size: u32) -> hgct_worker::Result<()> {
    let model = model(vocab_size);
    engine.load(&[StageLoad { stage: StageId(0), model, layers: 0..3, recompute: false }])
}

/// The error of a forward; panics where there is none.
fn forward(engine: &mut BurnEngine) -> Result<(), String> {
    let ids = |name| Lease::of_i32(name, vec![1, 8], vec![1; 8]);
    let answer = engine.forward(StageId(0), 0, Edge::new(vec![ids("input_ids"), ids("labels")]));
    answer.map(drop).map_err(|error| error.to_string())
}

/// Runs the program to its end, or fails after a minute.
fn finish(mut command: Command) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let end = Instant::now() + Duration::from_mins(1);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > end {
            child.kill().unwrap();
            panic!("it hangs: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().unwrap()
}

#[test]
fn a_lost_device_is_an_error_of_the_next_call() {
    let mut engine = engine();
    load(&mut engine, 96).unwrap();
    forward(&mut engine).unwrap();
    engine.abort().unwrap();
    engine.raw_device().destroy();
    let begun = Instant::now();
    let error = forward(&mut engine).expect_err("a destroyed device computed");
    assert!(error.starts_with("engine burn: forward failed: "), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_tensor_that_no_binding_holds_is_refused_by_name() {
    let mut engine = engine();
    // 16 Mi rows of 64 values: 4 GiB.
    let error = load(&mut engine, 1 << 24).unwrap_err().to_string();
    assert!(error.contains("take 4294967296 bytes, but this adapter binds at most"), "{error}");
    // The worker can be asked for something else.
    load(&mut engine, 96).unwrap();
    forward(&mut engine).unwrap();
}

#[test]
fn a_micro_batch_that_no_binding_holds_is_refused_and_a_smaller_one_computes() {
    let mut engine = engine();
    load(&mut engine, 96).unwrap();
    // Scores of 1024 samples, 4 heads and 1024² pairs of tokens: 16 GiB.
    let ids = |name| Lease::of_i32(name, vec![1024, 1024], vec![1; 1 << 20]);
    let error =
        engine.forward(StageId(0), 0, Edge::new(vec![ids("input_ids"), ids("labels")])).err().unwrap();
    let wanted = "attention scores of 1024 samples of 1024 tokens take 17179869184 bytes";
    assert!(error.to_string().contains(wanted), "{error}");
    forward(&mut engine).unwrap();
}

#[test]
fn what_a_micro_batch_in_flight_keeps_is_counted() {
    let mut engine = engine();
    load(&mut engine, 96).unwrap();
    forward(&mut engine).unwrap();
    engine.abort().unwrap();
    let before = engine.tensor_bytes().unwrap();
    forward(&mut engine).unwrap();
    let kept = engine.tensor_bytes().unwrap() - before;
    // 8 tokens: logits, gates and attention weights, each at least once.
    assert!(kept > 4 * 8 * (96 + 3 * 80 + 4 * 8), "{kept} bytes");
    // Burn lets go of dropped graphs at the next backward.
    for _ in 0..8 {
        engine.drop_micro_batch(0).unwrap();
        forward(&mut engine).unwrap();
    }
    engine.backward(StageId(0), 0, BackwardPart::Full, Edge::default(), None).unwrap();
    engine.zero_gradients(StageId(0)).unwrap();
    let left = engine.tensor_bytes().unwrap();
    assert!(left <= before + kept, "{left} bytes after {before}, {kept} each");
}

#[test]
fn other_dtypes_are_refused() {
    let mut engine = engine();
    load(&mut engine, 96).unwrap();
    let half = Lease::of_bytes("model.norm.weight", hgct_core::dtype::DType::Bf16, vec![64], vec![0u8; 128]);
    let rows = [hgct_worker::engine::ImportRows { lease: half, first_row: 0 }];
    let error = engine.import(StageId(0), &rows).unwrap_err().to_string();
    assert!(error.contains("model.norm.weight is bf16"), "{error}");
}

#[test]
fn without_memory_an_adapter_fails_and_does_not_hang() {
    let device = adapter::list().remove(0).device_string;
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v 150000; exec \"$0\" --try \"$1\"", PROGRAM, &device]);
    let output = finish(command);
    assert!(!output.status.success());
}

/// In the environment of a process that is to run out of memory.
const SMALL: &str = "HGCT_TEST_SMALL";

#[test]
fn stages_that_find_no_memory_are_an_error_and_nothing_hangs() {
    if std::env::var_os(SMALL).is_some() {
        let mut engine = engine();
        // Embedding and head of 64 MiB each, a hundred times.
        let stage =
            |at| StageLoad { stage: StageId(at), model: model(1 << 18), layers: 0..3, recompute: false };
        let error = engine.load(&(0..100).map(stage).collect::<Vec<_>>()).err().unwrap();
        eprintln!("refused: {error}");
        return;
    }
    let mut command = Command::new("sh");
    let name = "stages_that_find_no_memory_are_an_error_and_nothing_hangs";
    command.args(["-c", "ulimit -v 2000000; exec \"$0\" --exact \"$1\" --nocapture"]);
    command.arg(std::env::current_exe().unwrap()).arg(name).env(SMALL, "1");
    let output = finish(command);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("refused: engine burn: load failed: "), "{output:?}");
}

#[test]
fn a_driver_that_crashes_takes_only_the_probe_with_it() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("crash-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = |name: &str| folder.join(name);
    let source = "#include <signal.h>\n\
        void *vk_icdGetInstanceProcAddr(void *i, const char *n) { raise(SIGSEGV); return 0; }\n\
        int vk_icdNegotiateLoaderICDInterfaceVersion(unsigned *v) { raise(SIGSEGV); return 0; }\n";
    std::fs::write(path("driver.c"), source).unwrap();
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([path("libdriver.so"), path("driver.c")])
        .status()
        .unwrap();
    assert!(compiled.success());
    let manifest = format!(
        r#"{{"file_format_version":"1.0.0","ICD":{{"library_path":{:?},"api_version":"1.3.0"}}}}"#,
        path("libdriver.so")
    );
    std::fs::write(path("driver.json"), manifest).unwrap();
    let mut command = Command::new(PROGRAM);
    command
        .arg("--probe")
        .env("VK_DRIVER_FILES", path("driver.json"))
        .env("VK_ICD_FILENAMES", path("driver.json"));
    let output = finish(command);
    assert!(!output.status.success(), "{output:?}");
}

#[test]
fn no_driver_at_all_says_what_to_install() {
    let none = Path::new("/nonexistent/none.json");
    let mut command = Command::new(PROGRAM);
    command.arg("--probe").env("VK_DRIVER_FILES", none).env("VK_ICD_FILENAMES", none);
    let output = finish(command);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && said.contains("mesa-vulkan-drivers"), "{said}");
}

#[test]
fn orders_of_another_version_are_refused_before_they_are_read() {
    let mut command = Command::new(PROGRAM);
    command.env("HGCT_CORE", "older").stdin(Stdio::null());
    let output = finish(command);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("stale") && said.contains("make vulkan"), "{said}");
}
