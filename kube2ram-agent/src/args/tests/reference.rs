//! The documents' tables of flags and annotations are what the command line is, and the commands in the
//! documents are ones that it takes. Depends on clap, the limits in `role` and `policy`, and the documents in
//! the repository.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use clap::Arg;

use crate::args::{Command, flags, retired};
use kube2ram_cloud::role::{MAX_DURATION, MIN_DURATION};
use kube2ram_sandbox::documents::{keep_current, row};

const DOCUMENTS: [&str; 2] = ["README.md", "README.zh-CN.md"];
const NO_DEFAULT: &str = "–";

fn command() -> clap::Command {
    retired::add_to(flags::command())
}

#[test]
fn the_tables_of_flags_are_current() {
    let command = command();
    let subcommands: String = command.get_subcommands().map(|sub| subcommand(sub, "kube2ram")).collect();

    keep_current("docs/flags.md", "flags", &by_heading(&command));
    keep_current("docs/flags.md", "subcommands", &format!("{subcommands}\n"));
}

#[test]
fn the_tables_of_annotations_are_current() {
    let table = annotations();

    keep_current("docs/annotations.md", "annotations", &table);
    keep_current("docs/annotations.md", "annotation-keys", &annotation_keys());
    keep_current("README.md", "annotations", &table);
}

#[test]
fn the_flags_that_are_picked_out_exist_and_have_these_defaults() {
    let command = command();
    for document in DOCUMENTS.into_iter().filter(|name| repository().join(name).exists()) {
        let text = fs::read_to_string(repository().join(document)).unwrap();
        let mut picked = 0;
        for line in text.lines().filter(|line| line.starts_with("| `--")) {
            let cells: Vec<_> = line.split('|').map(str::trim).collect();
            let name = cells[1].trim_matches('`').trim_start_matches("--");
            let arg = command.get_arguments().find(|arg| arg.get_long() == Some(name));
            let arg = arg.unwrap_or_else(|| panic!("{document}: there is no --{name}"));

            assert_eq!(cells[2], default(arg), "{document}: --{name}");
            picked += 1;
        }
        assert!(picked > 5, "{document}: its table of flags was not found");
    }
}

#[test]
fn the_documents_name_no_flag_that_does_not_exist() {
    let known = known_flags(&command());
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        // A code span that begins with a flag is one of kube2ram's; other programs' flags follow their
        // command (`kubelet --…`).
        for span in text.split('`').skip(1).step_by(2).filter(|span| span.starts_with("--")) {
            let name = span[2..].split(|c: char| !c.is_ascii_alphanumeric() && c != '-').next().unwrap();
            assert!(
                known.iter().any(|flag| flag == name),
                "{}: there is no --{name}; another program's is written behind its name",
                document.display()
            );
        }
    }
}

#[test]
fn the_commands_in_the_documents_are_ones_that_it_takes() {
    let env = |name: &str| (name == "NODE_NAME").then(|| OsString::from("n"));
    let mut seen = 0;
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for line in text.lines().filter_map(|line| line.strip_prefix("$ kube2ram ")) {
            let words = line.split_whitespace().take_while(|word| !matches!(*word, "#" | "|" | "&&"));
            let words = words.filter(|word| !word.starts_with('<')).map(OsString::from);
            let parsed = Command::from_args([OsString::from("kube2ram")].into_iter().chain(words), &env);

            assert!(parsed.is_ok(), "{}: {line}: {}", document.display(), parsed.unwrap_err());
            seen += 1;
        }
    }
    assert!(seen > 0, "no document shows a command");
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The documents at the top, and all below `docs`.
fn documents() -> Vec<PathBuf> {
    let mut documents = Vec::new();
    for directory in ["", "docs", "docs/aws", "docs/internals", "docs/zh-CN"] {
        for entry in fs::read_dir(repository().join(directory)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "md") {
                documents.push(path);
            }
        }
    }
    assert!(documents.len() > 5, "{documents:?}");
    documents
}

/// Of the agent and of all subcommands, aliases among them.
fn known_flags(command: &clap::Command) -> Vec<String> {
    let mut flags: Vec<_> = command.get_subcommands().flat_map(known_flags).collect();
    for arg in command.get_arguments() {
        flags.extend(arg.get_long().map(str::to_owned));
        flags.extend(arg.get_all_aliases().into_iter().flatten().map(str::to_owned));
    }
    flags.extend(["help", "version"].map(str::to_owned));
    flags
}

/// A table for each heading, in the order in which `--help` has them.
fn by_heading(command: &clap::Command) -> String {
    let mut headings: Vec<&str> = Vec::new();
    for heading in command.get_arguments().filter_map(Arg::get_help_heading) {
        if !headings.contains(&heading) {
            headings.push(heading);
        }
    }
    let of = |heading: &str| -> Vec<&Arg> {
        command.get_arguments().filter(|arg| arg.get_help_heading() == Some(heading)).collect()
    };
    let table = |heading: &str| format!("\n### {heading}\n\n{}", table(&of(heading)));
    headings.into_iter().map(table).collect::<String>() + "\n"
}

/// What it does, and its own flags.
fn subcommand(command: &clap::Command, parent: &str) -> String {
    let name = format!("{parent} {}", command.get_name());
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let (positional, own): (Vec<_>, Vec<_>) = command.get_arguments().partition(|arg| arg.is_positional());
    let words: String = positional.into_iter().map(word).collect();
    let table = if own.is_empty() { String::new() } else { format!("\n{}", table(&own)) };
    let below: String = command.get_subcommands().map(|sub| subcommand(sub, &name)).collect();
    format!("\n### `{name}{words}`\n\n{}.\n{table}{below}", prose(&about))
}

/// An argument that is no flag, in brackets where it may be left out.
fn word(arg: &Arg) -> String {
    let name =
        arg.get_value_names().and_then(<[_]>::first).map(|name| name.to_lowercase()).unwrap_or_default();
    if arg.is_required_set() { format!(" <{name}>") } else { format!(" [{name}]") }
}

fn table(args: &[&Arg]) -> String {
    let head = row(["flag", "default", "what it does"]) + &row(["---"; 3]);
    let rows = args
        .iter()
        .filter(|arg| arg.get_long().is_some())
        .map(|arg| row([flag(arg).as_str(), &default(arg), &format!("{}.", prose(&help(arg)))]));
    head + &rows.collect::<String>()
}

/// What it does, without its default.
fn help(arg: &Arg) -> String {
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    help.split_once(" [default: ").map_or(help.clone(), |(help, _)| help.to_owned())
}

/// The flag with its value and its other names.
fn flag(arg: &Arg) -> String {
    let name = arg.get_long().unwrap_or_default();
    let short = arg.get_short().map(|short| format!("`-{short}`, ")).unwrap_or_default();
    let choices: Vec<_> = arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
    let value = match arg.get_value_names() {
        _ if !arg.get_action().takes_values() => String::new(),
        _ if !choices.is_empty() => format!(" {}", choices.join("|")),
        Some([value]) if value.as_str() != "BOOL" => format!(" {value}"),
        _ => String::new(),
    };
    let others = arg.get_all_aliases().into_iter().flatten().map(|other| format!(", also `--{other}`"));
    format!("{short}`--{name}{value}`{}", others.collect::<String>())
}

fn default(arg: &Arg) -> String {
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let values: Vec<_> =
        arg.get_default_values().iter().map(|value| format!("`{}`", value.display())).collect();
    match help.split_once(" [default: ") {
        Some((_, told)) => {
            format!("`{}`", told.trim_end_matches(']').replace("; on AWS ", "`; on AWS `"))
        }
        None if values.is_empty() => NO_DEFAULT.to_owned(),
        None => values.join(", "),
    }
}

/// Help text as Markdown: flags as code, and what Markdown would take for its own escaped.
fn prose(help: &str) -> String {
    let word = |word: &str| {
        let end = word.trim_end_matches(['.', ',', ':', ';', ')']).len();
        if word.starts_with("--") || word.contains('<') {
            return format!("`{}`{}", &word[..end], &word[end..]);
        }
        word.replace('*', "\\*")
    };
    let mut is_placeholder = false;
    let words = help.split(|c| {
        is_placeholder = (is_placeholder || c == '<') && c != '>';
        c == ' ' && !is_placeholder
    });
    words.map(word).collect::<Vec<_>>().join(" ")
}

/// On what, by which flag its key is changed, and what it may say.
fn known_annotations() -> [(&'static str, &'static str, String); 6] {
    let minutes = |duration: std::time::Duration| duration.as_secs() / 60;
    let (min, max) = (minutes(MIN_DURATION), minutes(MAX_DURATION) / 60);
    [
        ("pod", "ram-role-key", "role name, path and name, or ARN".to_owned()),
        (
            "pod",
            "ram-external-id",
            "external id, when the role's trust policy asks for one: 2–1224 of `A-Za-z0-9_+=,.@:/-`".to_owned(),
        ),
        (
            "pod",
            "ram-policy-key",
            "session policy, a JSON object of up to 2048 characters; narrows what the role may do".to_owned(),
        ),
        (
            "pod",
            "ram-session-duration-key",
            format!("`{min}m` – `{max}h`; where the role allows less, the longest of 8, 6, 4, 2 and 1 h that it allows"),
        ),
        (
            "pod",
            "ram-session-name-key",
            "what the cloud's audit trail shows instead of `<namespace>.<service account>`: 2–64 of `A-Za-z0-9.@_-`, on AWS also of `+=,`".to_owned(),
        ),
        (
            "namespace",
            "namespace-key",
            "JSON array of patterns, e.g. `[\"orders-*\", \"acs:ram::*:role/shared-*\"]`; read with `--namespace-restrictions`"
                .to_owned(),
        ),
    ]
}

fn annotations() -> String {
    let (command, known) = (command(), known_annotations());
    let is_annotation =
        |arg: &&Arg| arg.get_help().is_some_and(|help| help.to_string().starts_with("Annotation key"));
    let keys = command.get_arguments().filter(is_annotation).count();
    assert_eq!(keys, known.len(), "an annotation is missing here");
    let rows = known.iter().map(|(on, flag, value)| row([*on, &key(&command, flag), value]));
    row(["on", "key", "value"]) + &row(["---"; 3]) + &rows.collect::<String>()
}

fn annotation_keys() -> String {
    let command = command();
    let rows = known_annotations().into_iter().map(|(_, name, _)| {
        let arg = command.get_arguments().find(|arg| arg.get_long() == Some(name)).unwrap();
        row([flag(arg).as_str(), &default(arg), &format!("{}.", prose(&help(arg)))])
    });
    row(["flag", "default", "what it is"]) + &row(["---"; 3]) + &rows.collect::<String>()
}

/// The default key of the annotation that a flag names.
fn key(command: &clap::Command, name: &str) -> String {
    let arg = command.get_arguments().find(|arg| arg.get_long() == Some(name));
    default(arg.unwrap_or_else(|| panic!("there is no --{name}")))
}
