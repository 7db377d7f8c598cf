//! `hgct-worker-burn`: started by an agent with its orders on standard input, or with an option.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use hgct_worker::engine::Engine;
use hgct_worker_burn::{BurnEngine, plain, probe};

/// Which sources of the core this was built from.
const CORE: &str = env!("HGCT_CORE");

const USAGE: &str = "\
hgct-worker-burn: the worker of hgct that needs no Python. An agent starts it; by hand:

    hgct-worker-burn --probe       which adapters there are, as one line of JSON
    hgct-worker-burn --try DEVICE  whether one of them computes
    hgct-worker-burn --plain DEVICE CONFIG TOKENS SEQ_LEN MICRO_BATCH NUM_MICRO_BATCHES
                                   a plain Burn loop of the same model, to compare with
    hgct-worker-burn --version";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        // Whoever types its name waits for something else than orders.
        [] if std::io::stdin().is_terminal() => usage(),
        [] => work(),
        ["--probe"] => {
            println!("{}", probe::answer());
            ExitCode::SUCCESS
        }
        ["--try", device] => match probe::try_adapter(device) {
            Ok(()) => ExitCode::SUCCESS,
            Err(reason) => fail(&reason),
        },
        ["--plain", device, config, tokens, seq_len, micro_batch, number] => {
            let Ok(shape) =
                [seq_len, micro_batch, number].map(str::parse).into_iter().collect::<Result<Vec<_>, _>>()
            else {
                return usage();
            };
            let shape = [shape[0], shape[1], shape[2]];
            let arguments =
                plain::Arguments { device, config: config.as_ref(), tokens: tokens.as_ref(), shape };
            match plain::run(&arguments) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&hgct_worker::error_chain(&error)),
            }
        }
        ["--version"] => {
            println!(
                "hgct-worker-burn {} (Burn {})",
                env!("CARGO_PKG_VERSION"),
                hgct_worker_burn::BURN_VERSION
            );
            ExitCode::SUCCESS
        }
        ["-h" | "--help"] => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => usage(),
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

fn work() -> ExitCode {
    // Before the first order is read, whose form may be another one.
    if let Ok(theirs) = std::env::var("HGCT_CORE")
        && theirs != CORE
    {
        return fail(&format!(
            "this hgct-worker-burn is stale: it was built from another version of the core ({CORE}) than the \
             hgct that starts it ({theirs}): run `make vulkan`"
        ));
    }
    let open = |place: &hgct_worker::runtime::EnginePlace| {
        let mut engine = BurnEngine::open(&place.device_string)?;
        engine.prepare()?;
        Ok(Box::new(engine) as Box<dyn Engine>)
    };
    match hgct_worker::runtime::run(open) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => fail(&hgct_worker::error_chain(&error)),
    }
}

fn fail(reason: &str) -> ExitCode {
    eprintln!("{reason}");
    ExitCode::FAILURE
}
