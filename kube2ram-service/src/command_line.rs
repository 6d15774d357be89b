//! What our programs' command lines have in common: how they end on an error, and values that Go's flag
//! library takes. Pure, and without a parser's types: each program's `args` has the parser.

use crate::telemetry::LogFormat;

/// Why there is no command. `Display` is the whole message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgsError {
    /// `--help` or `--version` was asked for: the parser's text, for standard output.
    #[error("{0}")]
    Help(String),
    /// One line: what is wrong, and what to do.
    #[error("{0}")]
    Usage(String),
}

impl ArgsError {
    /// What the process should exit with: 0 or, after sysexits.h, `EX_USAGE`.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Help(_) => 0,
            Self::Usage(_) => 64,
        }
    }

    /// What is wrong, in one line.
    pub fn usage(line: impl Into<String>) -> Self {
        Self::Usage(line.into())
    }

    /// Of clap's text, with the exit status that clap would end with.
    pub fn of_parser(program: &str, exit_code: i32, text: String) -> Self {
        if exit_code == 0 {
            return Self::Help(text);
        }
        // What is wrong and perhaps a tip, without the usage; user text in them may hold line breaks.
        let (text, _) =
            text.split_once("\n\nUsage:").or(text.split_once("\n\nFor more")).unwrap_or((&text, ""));
        let words: Vec<_> = text.split_whitespace().collect();
        let line = words.join(" ");
        Self::Usage(format!("{} (see {program} --help)", line.strip_prefix("error: ").unwrap_or(&line)))
    }
}

/// Go's strconv.ParseBool.
///
/// # Errors
/// What to give instead.
pub fn boolean(text: &str) -> Result<bool, &'static str> {
    match text {
        "1" | "t" | "T" | "true" | "True" | "TRUE" => Ok(true),
        "0" | "f" | "F" | "false" | "False" | "FALSE" => Ok(false),
        _ => Err("give true or false"),
    }
}

/// The value of `--log-format`, in any case.
///
/// # Errors
/// What to give instead.
pub fn log_format(text: &str) -> Result<LogFormat, &'static str> {
    match text.to_ascii_lowercase().as_str() {
        "json" => Ok(LogFormat::Json),
        "text" => Ok(LogFormat::Text),
        _ => Err("give text or json"),
    }
}
