//! Discovery on made-up hosts: folders with fake driver files, tools and interpreters.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use tempfile::TempDir;

use super::*;

/// A host: its file system and its table of environments.
struct Fake {
    top: TempDir,
    table: String,
}

impl Fake {
    fn new() -> Self {
        let fake = Self { top: tempfile::tempdir().unwrap(), table: String::new() };
        fake.file("root/proc/cpuinfo", "model name\t: Test CPU\n");
        fake.file("root/proc/meminfo", "MemTotal: 16777216 kB\n");
        fs::create_dir_all(fake.top.path().join("vendors")).unwrap();
        fake
    }

    fn path(&self, name: &str) -> PathBuf {
        self.top.path().join(name)
    }

    fn file(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn program(&self, name: &str, script: &str) {
        self.file(name, &format!("#!/bin/sh\n{script}\n"));
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A vendor that answers to `cuda`, with one card that its driver file, tool and library show.
    fn vendor(&self, name: &str, uuid: &str) {
        self.file(
            &format!("vendors/{name}.toml"),
            &format!(
                "format = 1\nname = \"{name}\"\ntitle = \"{name}\"\nverified = \"never\"\n\
                 [recognise]\ndriver_files = [\"/dev/{name}ctl\"]\ncard_files = [\"/dev/{name}[0-9]*\"]\n\
                 libraries = [\"lib{name}.so\"]\n\
                 [recognise.tool]\ncommand = [\"{name}-smi\", \"-q\"]\ncolumns = [\"uuid\", \"name\", \"memory-mib\", \"driver\"]\n\
                 [[engine]]\nengine = \"torch\"\ndevice = \"cuda:{{index}}\"\nvisibility = \"{}_VISIBLE\"\n",
                name.to_uppercase()
            ),
        );
        self.file(&format!("root/dev/{name}ctl"), "");
        self.file(&format!("root/dev/{name}0"), "");
        self.program(&format!("root/usr/bin/{name}-smi"), &format!("echo '{uuid}, {name} X1, 8192, 1.2.3'"));
    }

    fn environment(&mut self, name: &str, engine: &str, script: &str) {
        self.program(&format!("env/{name}"), script);
        let interpreter = self.path(&format!("env/{name}"));
        let row = format!("name = \"{name}\"\nengine = \"{engine}\"\ninterpreter = {interpreter:?}\n");
        self.table.push_str("[[environment]]\n");
        self.table.push_str(&row);
    }

    fn options(&self) -> Options {
        self.file("environments.toml", &self.table);
        let mut options = Options::new(NodeId::new("n").unwrap(), self.top.path());
        options.root = self.path("root");
        options.vendors = Some(self.path("vendors"));
        options.deadline = Duration::from_secs(20);
        options
    }

    fn discover(&self) -> Discovery {
        discover(&self.options()).unwrap()
    }
}

/// What a fake interpreter prints for one device. It is called as `-c SCRIPT ENGINE DEVICE`.
fn answer(device: &str, uuid: Option<&str>, libraries: &str) -> String {
    let uuid = uuid.map_or("null".to_owned(), |uuid| format!("\"{uuid}\""));
    format!(
        r#"echo '{{"python":"3.11.0","version":"2.0","libraries":[{libraries}],"devices":[{{"index":0,"device":"{device}","name":"GPU","uuid":{uuid},"pci":null,"memory_bytes":1024}}]}}'"#
    )
}

fn kinds(found: &Discovery) -> Vec<(&str, &str, &str)> {
    let devices = found.node.devices.iter();
    devices.map(|d| (d.kind.as_str(), d.environment.as_str(), d.device_string.as_str())).collect()
}

#[test]
fn three_vendors_that_all_answer_cuda_are_three_kinds() {
    let mut fake = Fake::new();
    for (name, uuid) in [("alpha", "GPU-aa"), ("beta", "bb"), ("gamma", "cc")] {
        fake.vendor(name, uuid);
    }
    // Two plug-ins in one environment: what is visible decides which one answers. The answer names
    // its card for alpha; for beta only the library tells.
    let (alpha, beta) = (answer("cuda:0", Some("aa"), ""), answer("cuda:0", None, "\"libbeta.so.2\""));
    let both = format!(
        "[ \"$4\" = cpu ] && {} && exit\n\
         [ -z \"${{ALPHA_VISIBLE-x}}\" ] || [ -z \"${{BETA_VISIBLE+x}}\" ] || {{ {alpha}; exit; }}\n\
         [ -z \"${{ALPHA_VISIBLE+x}}\" ] || {{ {beta}; exit; }}\n\
         echo '{{\"error\": \"no device\"}}'",
        answer("cpu", None, "")
    );
    fake.environment("torch-ab", "torch", &both);
    // This one answers `cuda` for everybody, and it is always gamma's card.
    fake.environment("torch-c", "torch", &answer("cuda:0", Some("CC"), "\"libgamma.so\""));
    let found = fake.discover();
    let mut found_kinds = kinds(&found);
    found_kinds.retain(|(kind, ..)| !kind.starts_with("cpu"));
    assert_eq!(
        found_kinds,
        [
            ("alpha-x1-8gib/torch-ab", "torch-ab", "cuda:0"),
            ("beta-x1-8gib/torch-ab", "torch-ab", "cuda:0"),
            ("gamma-x1-8gib/torch-c", "torch-c", "cuda:0"),
        ],
        "{:#?}",
        found.unusable
    );
    let identities: BTreeSet<_> = found.node.devices.iter().map(|device| &device.identity).collect();
    assert!(["aa", "bb", "cc"].iter().all(|id| identities.contains(&(*id).to_owned())));
    let ids: BTreeSet<_> = found.node.devices.iter().map(|device| &device.id).collect();
    assert_eq!(ids.len(), found.node.devices.len(), "ids repeat");
    // The other environment's `cuda` is neither alpha's nor beta's, and says so.
    let wrong: Vec<_> = found.unusable.iter().filter(|device| device.name.contains("torch-c")).collect();
    assert!(
        wrong
            .iter()
            .any(|d| d.name == "alpha in torch-c cuda:0" && d.reason.contains("cc is no card of alpha"))
    );
    assert!(wrong.iter().any(|d| d.name == "beta in torch-c cuda:0"));
    // A worker of beta starts with what made the probe see beta.
    let beta = found.node.devices.iter().find(|device| device.vendor == "beta").unwrap();
    assert_eq!(found.details[&beta.id].variables["ALPHA_VISIBLE"], "");
}

#[test]
fn one_card_is_offered_once_however_many_environments_drive_it() {
    let mut fake = Fake::new();
    fake.vendor("alpha", "aa");
    for name in ["one", "two"] {
        fake.environment(name, "torch", &answer("cuda:0", Some("aa"), ""));
    }
    let found = fake.discover();
    let cards: Vec<_> = found.node.devices.iter().filter(|device| device.vendor == "alpha").collect();
    assert_eq!(cards.len(), 1);
    assert_eq!(cards[0].id.as_str(), "n/one:1", "the table's order decides");
    assert!(found.unusable.iter().any(|device| device.reason == "aa is already offered as n/one:1"));
}

#[test]
fn the_processor_is_several_kinds_on_one_resource() {
    let mut fake = Fake::new();
    for (name, engine) in [("jax", "jax"), ("mlx", "mlx"), ("mlx-py312", "mlx")] {
        fake.environment(name, engine, &answer("cpu", None, ""));
    }
    let found = fake.discover();
    assert_eq!(
        kinds(&found).iter().map(|(kind, ..)| *kind).collect::<Vec<_>>(),
        ["cpu-test/jax", "cpu-test/mlx", "cpu-test/mlx-py312"]
    );
    let same = |device: &DeviceSpec| device.host_resource == "cpu" && device.identity == "Test CPU";
    assert!(found.node.devices.iter().all(same));
    assert_eq!(found.unusable, []);
}

#[test]
fn a_runtime_that_misbehaves_is_a_line() {
    let mut fake = Fake::new();
    fake.environment("good", "jax", &answer("cpu", None, ""));
    fake.environment("crash", "torch", "kill -SEGV $$");
    fake.environment("hang", "mlx", "sleep 1000");
    fake.environment("error", "paddle", r#"echo '{"error": "ImportError: no module named paddle"}'"#);
    fake.table += "framework_version = \"9\"\n";
    fake.environment("stale", "torch", &answer("cpu", None, ""));
    fake.table += "framework_version = \"1.0\"\n[[environment]]\nname = \"gone\"\nengine = \"mlx\"\n\
                   interpreter = \"/nonexistent/python\"\n[[environment]]\nname = \"aside\"\nengine = \"jax\"\n\
                   interpreter = \"/bin/true\"\nunusable = \"no disk\"\n";
    let mut options = fake.options();
    options.deadline = Duration::from_secs(2);
    let found = discover(&options).unwrap();
    assert_eq!(found.node.devices.len(), 1);
    let reason = |name: &str| {
        let name = format!("processor in {name}");
        let line = found.unusable.iter().find(|device| device.name == name);
        line.unwrap_or_else(|| panic!("no line for {name}")).reason.clone()
    };
    assert_eq!(reason("crash"), "crashed with signal 11 (SIGSEGV)");
    assert_eq!(reason("hang"), "did not answer within 2 s");
    assert_eq!(reason("error"), "ImportError: no module named paddle");
    assert!(reason("stale").contains("says torch 1.0, but 2.0 is installed"));
    assert!(reason("gone").contains("there is no /nonexistent/python"));
    assert_eq!(reason("aside"), "no disk");
    let text = table::text(&found);
    assert!(text.contains("n/good:0") && text.contains("not usable:"), "{text}");
    let printed: serde_json::Value = serde_json::from_str(&table::json(&found)).unwrap();
    let ids: Vec<_> = printed["rows"].as_array().unwrap().iter().map(|row| &row["id"]).collect();
    assert!(ids.iter().any(|id| **id == "n/good:0") && printed["unusable"].is_array(), "{printed}");
}

#[test]
fn hardware_without_an_environment_says_what_would_drive_it() {
    let mut fake = Fake::new();
    fake.file("root/dev/davinci_manager", "");
    fake.file("root/dev/davinci0", "");
    fake.file("root/dev/mtgpu.0", "");
    fake.environment("jax", "jax", &answer("cpu", None, ""));
    let found = fake.discover();
    let line = found.unusable.iter().find(|device| device.name == "Huawei Ascend").unwrap();
    assert_eq!(line.reason, "no environment drives it: one with torch and torch_npu, or paddle would");
    assert!(found.unusable.iter().any(|device| device.name == "Moore Threads"));
}

#[test]
fn good_answers_are_kept_until_the_environment_changes() {
    let mut fake = Fake::new();
    let count = fake.path("count");
    let script = format!("echo x >> {}\n{}", count.display(), answer("cpu", None, ""));
    fake.environment("jax", "jax", &script);
    let asked = || fs::read_to_string(&count).unwrap_or_default().lines().count();
    let first = fake.discover();
    assert_eq!(fake.discover(), first);
    assert_eq!(asked(), 1);
    fake.table += "lock_hash = \"ab\"\n";
    fake.discover();
    assert_eq!(asked(), 2);
}

#[test]
fn mistakes_in_the_table_end_discovery() {
    let mut fake = Fake::new();
    fake.table = "[[environment]]\nnmae = \"x\"\n".into();
    let error = discover(&fake.options()).unwrap_err().to_string();
    assert!(error.contains("did you mean `name`"), "{error}");
    fake.table = String::new();
    assert_eq!(discover(&fake.options()).unwrap().node.devices, []);
}

/// A worker without Python that answers with these adapters: PCI address, what is wrong.
fn native(fake: &Fake, rows: &[&str]) {
    fake.program(
        "bin/hgct-worker-burn",
        &format!(
            "[ \"$1\" = --probe ] || exit 3\necho '{{\"version\":\"0.22.1\",\"devices\":[{}]}}'",
            rows.join(",")
        ),
    );
}

const SOFTWARE: &str = r#"{"index":0,"device":"vulkan:10005:0000:0","name":"llvmpipe","uuid":null,"pci":null,
    "memory_bytes":null,"driver":"llvmpipe 1","software":true}"#;
const CARD: &str = r#"{"index":1,"device":"vulkan:10de:2330:0","name":"NVIDIA H100","uuid":null,
    "pci":"0000:3b:00.0","memory_bytes":85899345920,"driver":"NVIDIA 550.54","asked_for":false}"#;
const BROKEN: &str = r#"{"index":2,"device":"vulkan:8086:4680:0","name":"Intel","uuid":null,
    "pci":"0000:00:02.0","memory_bytes":null,"error":"its driver crashed at the first kernel"}"#;

#[test]
fn adapters_are_kinds_without_a_table_and_each_says_what_is_wrong_with_it() {
    let fake = Fake::new();
    native(&fake, &[SOFTWARE, CARD, BROKEN]);
    let mut options = fake.options();
    std::fs::remove_file(&options.environments).unwrap();
    options.vendors = None;
    let found = discover(&options).unwrap();
    assert_eq!(
        kinds(&found),
        [
            ("vulkan-llvmpipe/burn", "burn", "vulkan:10005:0000:0"),
            ("vulkan-nvidia-h100-80gib/burn", "burn", "vulkan:10de:2330:0"),
        ],
        "{:#?}",
        found.unusable
    );
    let [software, card] = &found.node.devices[..] else { panic!("two devices") };
    assert_eq!((software.host_resource.as_str(), software.identity.as_str()), ("cpu", "Test CPU"));
    assert_eq!(card.host_resource, "0000:3b:00.0");
    assert_eq!(card.driver.as_deref(), Some("NVIDIA 550.54"));
    let broken = "Vulkan in burn vulkan:8086:4680:0 (Intel)";
    let broken = found.unusable.iter().find(|one| one.name == broken).unwrap();
    assert_eq!(broken.reason, "its driver crashed at the first kernel");
    assert!(!table::text(&found).contains("Python"));
}

/// The card of vendor alpha, as Vulkan sees it.
fn alpha(more: &[(&str, &str)]) -> String {
    let mut row = CARD.replace(r#""uuid":null"#, r#""uuid":"AA""#);
    for (from, to) in more {
        row = row.replace(from, to);
    }
    row
}

#[test]
fn a_card_that_its_own_stack_drives_is_no_second_one() {
    let mut fake = Fake::new();
    fake.vendor("alpha", "GPU-aa");
    fake.environment("torch", "torch", &answer("cuda:0", Some("aa"), ""));
    // Its address, which torch does not know, is not what tells.
    native(&fake, &[&alpha(&[])]);
    let cards = |found: &Discovery| {
        let cards = found.node.devices.iter().filter(|device| device.host_resource != "cpu");
        cards.map(|device| device.id.to_string()).collect::<Vec<_>>()
    };
    let found = fake.discover();
    assert_eq!(cards(&found), ["n/torch:1"], "{:#?}", found.unusable);
    let reason = "0000:3b:00.0 is already offered as n/torch:1";
    assert!(found.unusable.iter().any(|device| device.reason == reason), "{:#?}", found.unusable);
    // Who asks gets it, but not once for each driver that it has.
    let asked = ("\"asked_for\":false", "\"asked_for\":true");
    native(&fake, &[&alpha(&[asked]), &alpha(&[asked, (":2330:0", ":2330:1")])]);
    let found = fake.discover();
    assert_eq!(cards(&found), ["n/torch:1", "n/burn:0"]);
    let second = found.unusable.iter().find(|device| device.name.contains(":2330:1")).unwrap();
    assert_eq!(second.reason, "0000:3b:00.0 is already offered as n/burn:0");
}

#[test]
fn a_card_that_a_batch_system_withholds_is_left_alone() {
    let fake = Fake::new();
    fake.vendor("alpha", "aa");
    // Set in every process that cargo starts.
    let path = fake.path("vendors/alpha.toml");
    let vendor = fs::read_to_string(&path).unwrap().replace("ALPHA_VISIBLE", "CARGO_MANIFEST_DIR");
    fs::write(&path, vendor).unwrap();
    native(&fake, &[&alpha(&[]), SOFTWARE]);
    let found = fake.discover();
    assert_eq!(kinds(&found).len(), 1, "{:#?}", found.node.devices);
    let reason = "CARGO_MANIFEST_DIR says which cards of alpha may be used; HGCT_VULKAN_ADAPTERS can name it";
    assert!(found.unusable.iter().any(|device| device.reason == reason), "{:#?}", found.unusable);
    native(&fake, &[&alpha(&[("\"asked_for\":false", "\"asked_for\":true")])]);
    assert_eq!(kinds(&fake.discover()).len(), 1);
}
