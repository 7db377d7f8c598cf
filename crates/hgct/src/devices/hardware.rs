//! Which of a vendor's cards are on this host, told by driver files, PCI and the vendor's tool;
//! no framework is asked.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use globset::GlobBuilder;
use serde::Serialize;

use crate::process;
use crate::vendors::{Recognition, Tool, Vendor};

/// A vendor's tool that takes longer hangs: its driver does not answer.
const TOOL_DEADLINE: Duration = Duration::from_secs(15);
const MIB: u64 = 1 << 20;
const SEARCH: [&str; 6] = ["/usr/local/bin", "/usr/bin", "/bin", "/usr/local/sbin", "/usr/sbin", "/sbin"];
/// Display controllers, processing accelerators and co-processors.
const CLASSES: [&str; 3] = ["03", "12", "0b40"];

/// What a host has of one vendor.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(crate) struct Hardware {
    /// The cards; empty where only the framework can count them.
    pub(crate) cards: Vec<Card>,
    /// Version of the driver.
    pub(crate) driver: Option<String>,
    /// Why none of it can be used.
    pub(crate) problem: Option<String>,
}

/// One card.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(crate) struct Card {
    /// PCI address, `dddd:bb:dd.f`.
    pub(crate) pci: Option<String>,
    /// The vendor's UUID, lower case, without a prefix.
    pub(crate) uuid: Option<String>,
    /// Its device file, where it has one of its own.
    pub(crate) file: Option<String>,
    /// What the tool calls it.
    pub(crate) name: Option<String>,
    /// Its memory, bytes.
    pub(crate) memory_bytes: Option<u64>,
}

impl Card {
    /// What the card *is*, whatever drives it.
    pub(crate) fn identity(&self) -> Option<&str> {
        self.names().next()
    }

    /// All that tells it from others. Not all software that sees a card knows the same of it.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        [&self.pci, &self.uuid, &self.file].into_iter().filter_map(|name| name.as_deref())
    }

    /// Whether both are one card, as far as their names tell.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.names().any(|name| other.names().any(|known| known == name))
    }
}

/// Looks for a vendor's hardware under `root`; `None` where there is none.
pub(crate) fn find(root: &Path, vendor: &Vendor) -> Option<Hardware> {
    let signs = &vendor.recognise;
    if !matches(root, &signs.absent_files).is_empty() {
        return None;
    }
    let on_bus = pci_cards(root, signs);
    let files = matches(root, &signs.card_files);
    let drivers = matches(root, &signs.driver_files);
    let tool = signs.tool.as_ref().and_then(|tool| ask(root, tool));
    let listed = tool.as_ref().and_then(|answer| answer.as_ref().ok()).map_or(0, Vec::len);
    let driver_alone = signs.pci_vendors.is_empty() && !drivers.is_empty();
    if on_bus.is_empty() && files.is_empty() && listed == 0 && !driver_alone {
        return None;
    }
    let mut problem = None;
    if !signs.driver_files.is_empty() && drivers.is_empty() {
        let wanted = signs.driver_files.join(" or ");
        problem = Some(format!("its driver is not loaded: there is no {wanted}"));
    }
    let mut rows = Vec::new();
    match tool {
        Some(Ok(answer)) => rows = answer,
        Some(Err(reason)) => problem = problem.or(Some(reason)),
        None => {}
    }
    let driver = rows.iter().find_map(|row| row.get("driver").cloned()).or_else(|| version(root, signs));
    let mut cards: Vec<Card> = rows.iter().map(card_of_row).collect();
    if cards.iter().any(|card| card.identity().is_none()) || cards.is_empty() {
        // The tool does not say which card is which: names stay, the bus tells identities.
        let names: Vec<Card> = std::mem::take(&mut cards);
        let from_files = || files.iter().map(|file| Card { file: Some(file.clone()), ..Card::default() });
        cards = if on_bus.is_empty() { from_files().collect() } else { on_bus };
        if names.len() == cards.len() {
            for (card, named) in cards.iter_mut().zip(names) {
                (card.name, card.memory_bytes) = (named.name, named.memory_bytes);
            }
        }
    }
    Some(Hardware { cards, driver, problem })
}

/// A PCI address as the kernel writes it: `00000000:3B:00.0` becomes `0000:3b:00.0`.
pub(crate) fn normal_pci(address: &str) -> Option<String> {
    let address = address.trim().to_ascii_lowercase();
    let parts: Vec<&str> = address.split(':').collect();
    let (domain, bus, slot) = match parts[..] {
        [domain, bus, slot] => (u32::from_str_radix(domain, 16).ok()?, bus, slot),
        [bus, slot] => (0, bus, slot),
        _ => return None,
    };
    let bus = u8::from_str_radix(bus, 16).ok()?;
    let (device, function) = slot.split_once('.').unwrap_or((slot, "0"));
    let device = u8::from_str_radix(device, 16).ok()?;
    Some(format!("{domain:04x}:{bus:02x}:{device:02x}.{function}"))
}

/// A UUID without the vendor's prefix, such as `GPU-`.
pub(crate) fn normal_uuid(uuid: &str) -> Option<String> {
    let uuid = uuid.trim().to_ascii_lowercase();
    let bare = uuid.strip_prefix("gpu-").unwrap_or(&uuid);
    (!bare.is_empty() && !bare.starts_with('[')).then(|| bare.to_owned())
}

/// Paths under `root` that match one of the patterns, without the root, in natural order.
fn matches(root: &Path, patterns: &[String]) -> Vec<String> {
    let mut found = BTreeSet::new();
    for pattern in patterns {
        let (folder, name) = pattern.rsplit_once('/').unwrap_or(("", pattern));
        let Ok(glob) = GlobBuilder::new(name).build().map(|glob| glob.compile_matcher()) else { continue };
        let Ok(entries) = std::fs::read_dir(root.join(folder.trim_start_matches('/'))) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if glob.is_match(&name) {
                let name = name.to_string_lossy().into_owned();
                let digits: String = name.chars().filter(char::is_ascii_digit).collect();
                // Card 10 comes after card 9.
                found.insert((digits.parse::<u64>().unwrap_or(0), format!("{folder}/{name}")));
            }
        }
    }
    found.into_iter().map(|(_, path)| path).collect()
}

fn pci_cards(root: &Path, signs: &Recognition) -> Vec<Card> {
    let Ok(entries) = std::fs::read_dir(root.join("sys/bus/pci/devices")) else { return Vec::new() };
    let mut cards = Vec::new();
    for entry in entries.flatten() {
        let read = |file: &str| {
            let text = std::fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            text.trim().trim_start_matches("0x").to_ascii_lowercase()
        };
        let class = read("class");
        let wanted = if signs.pci_classes.is_empty() {
            CLASSES.iter().any(|begin| class.starts_with(begin))
        } else {
            signs.pci_classes.iter().any(|begin| class.starts_with(begin.as_str()))
        };
        if wanted && signs.pci_vendors.contains(&read("vendor")) {
            let pci = normal_pci(&entry.file_name().to_string_lossy());
            cards.push(Card { pci, ..Card::default() });
        }
    }
    cards.sort_by(|a, b| a.pci.cmp(&b.pci));
    cards
}

/// Asks the vendor's tool: `None` where it is not installed, its rows, or why it fails.
fn ask(root: &Path, tool: &Tool) -> Option<Result<Vec<BTreeMap<String, String>>, String>> {
    let (program, arguments) = tool.command.split_first()?;
    let path = locate(root, program, &tool.directories)?;
    let outcome = match process::run_bounded(Command::new(&path).args(arguments), TOOL_DEADLINE) {
        Ok(outcome) => outcome,
        Err(error) => return Some(Err(format!("{program} does not start: {error}"))),
    };
    match outcome.status {
        None => Some(Err(format!("{program} did not answer within {} s", TOOL_DEADLINE.as_secs()))),
        Some(status) if !status.success() => {
            let words = outcome.stdout.lines().next().unwrap_or_default();
            let said = if outcome.last_words().is_empty() { words } else { outcome.last_words() };
            Some(Err(format!("{program} fails with {}: {said}", process::describe(status))))
        }
        Some(_) => Some(Ok(rows(&outcome.stdout, &tool.columns))),
    }
}

fn locate(root: &Path, program: &str, directories: &[String]) -> Option<PathBuf> {
    let path = if root == Path::new("/") { std::env::var_os("PATH") } else { None };
    let searched = path.iter().flat_map(std::env::split_paths);
    let known = SEARCH.iter().copied().chain(directories.iter().map(String::as_str));
    let known = known.map(|folder| root.join(folder.trim_start_matches('/')));
    searched.chain(known).map(|folder| folder.join(program)).find(|path| path.is_file())
}

fn rows(output: &str, columns: &[String]) -> Vec<BTreeMap<String, String>> {
    if columns.is_empty() {
        return Vec::new();
    }
    let row = |line: &str| {
        let cells: Vec<&str> = line.split(',').map(str::trim).collect();
        let whole = cells.len() == columns.len();
        whole.then(|| columns.iter().cloned().zip(cells.into_iter().map(str::to_owned)).collect())
    };
    output.lines().filter_map(row).collect()
}

fn card_of_row(row: &BTreeMap<String, String>) -> Card {
    let memory = row.get("memory-mib").and_then(|mib| mib.parse::<u64>().ok());
    Card {
        pci: row.get("pci").and_then(|pci| normal_pci(pci)),
        uuid: row.get("uuid").and_then(|uuid| normal_uuid(uuid)),
        file: None,
        name: row.get("name").cloned(),
        memory_bytes: memory.map(|mib| mib * MIB),
    }
}

/// The first word with a digit in the first line of a version file (`Version=23.0.1`, `1.2.3`).
fn version(root: &Path, signs: &Recognition) -> Option<String> {
    signs.version_files.iter().find_map(|file| {
        let text = std::fs::read_to_string(root.join(file.trim_start_matches('/'))).ok()?;
        let words = text.lines().next()?.split(|c: char| c.is_whitespace() || c == '=');
        words.into_iter().find(|word| word.contains(|c: char| c.is_ascii_digit())).map(str::to_owned)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vendors;

    fn vendor(name: &str) -> Vendor {
        vendors::load(None).unwrap().into_iter().find(|vendor| vendor.name == name).unwrap()
    }

    fn put(root: &Path, file: &str, text: &str) {
        let path = root.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn pci(root: &Path, address: &str, vendor: &str, class: &str) {
        put(root, &format!("sys/bus/pci/devices/{address}/vendor"), &format!("0x{vendor}\n"));
        put(root, &format!("sys/bus/pci/devices/{address}/class"), &format!("0x{class}\n"));
    }

    #[test]
    fn a_card_without_driver_says_so() {
        let root = tempfile::tempdir().unwrap();
        pci(root.path(), "0000:3b:00.0", "10de", "030200");
        pci(root.path(), "0000:3b:00.1", "10de", "040300");
        let found = find(root.path(), &vendor("nvidia")).unwrap();
        assert_eq!(found.cards.len(), 1, "its sound device is no card");
        assert_eq!(found.problem.as_deref(), Some("its driver is not loaded: there is no /dev/nvidiactl"));
        put(root.path(), "dev/nvidiactl", "");
        put(root.path(), "sys/module/nvidia/version", "550.54.15\n");
        let found = find(root.path(), &vendor("nvidia")).unwrap();
        assert_eq!((found.problem, found.driver.as_deref()), (None, Some("550.54.15")));
        assert_eq!(found.cards[0].identity(), Some("0000:3b:00.0"));
    }

    #[test]
    fn vendors_that_share_a_sign_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        for file in ["dev/kfd", "dev/mkfd", "dev/dri/renderD128"] {
            put(root.path(), file, "");
        }
        pci(root.path(), "0000:01:00.0", "1d94", "120000");
        // A processor's bridge of the same PCI vendor.
        pci(root.path(), "0000:00:00.0", "1d94", "060000");
        assert_eq!(find(root.path(), &vendor("amd")), None);
        assert_eq!(find(root.path(), &vendor("intel")), None, "a render node alone is anybody's");
        assert_eq!(find(root.path(), &vendor("hygon")).unwrap().cards.len(), 1);
    }

    #[test]
    fn nothing_is_found_on_an_empty_host() {
        let root = tempfile::tempdir().unwrap();
        for vendor in vendors::load(None).unwrap() {
            assert_eq!(find(root.path(), &vendor), None, "{}", vendor.name);
        }
    }

    #[test]
    fn cards_are_in_natural_order() {
        let root = tempfile::tempdir().unwrap();
        for card in [0, 2, 10] {
            put(root.path(), &format!("dev/davinci{card}"), "");
        }
        put(root.path(), "dev/davinci_manager", "");
        let found = find(root.path(), &vendor("ascend")).unwrap();
        let names: Vec<_> = found.cards.iter().map(|card| card.identity().unwrap()).collect();
        assert_eq!(names, ["/dev/davinci0", "/dev/davinci2", "/dev/davinci10"]);
    }

    #[test]
    fn addresses_and_uuids_compare_however_they_are_written() {
        assert_eq!(normal_pci("00000000:3B:00.0").as_deref(), Some("0000:3b:00.0"));
        assert_eq!(normal_pci("3b:00").as_deref(), Some("0000:3b:00.0"));
        assert_eq!(normal_pci("[N/A]"), None);
        assert_eq!(normal_uuid("GPU-AB"), normal_uuid("ab"));
        assert_eq!(normal_uuid("[N/A]"), None);
    }
}
