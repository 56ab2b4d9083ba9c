package tlscert

import (
	"context"
	"log/slog"

	"go.uber.org/zap/zapcore"
)

// zapToSlog has certmagic's log, which is zap's, in the edge's own. Its levels are lowered: what a name's state is stands in
// lines of ours, and certmagic says each step.
type zapToSlog struct{ log *slog.Logger }

func slogLevel(l zapcore.Level) slog.Level {
	switch {
	case l >= zapcore.ErrorLevel:
		return slog.LevelWarn
	case l == zapcore.WarnLevel:
		return slog.LevelInfo
	}
	return slog.LevelDebug
}

func (z zapToSlog) Enabled(l zapcore.Level) bool {
	return z.log.Enabled(context.Background(), slogLevel(l))
}

func (z zapToSlog) With(fields []zapcore.Field) zapcore.Core {
	return zapToSlog{z.log.With(arguments(fields)...)}
}

func (z zapToSlog) Check(e zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if z.Enabled(e.Level) {
		return checked.AddCore(e, z)
	}
	return checked
}

func (z zapToSlog) Write(e zapcore.Entry, fields []zapcore.Field) error {
	z.log.Log(context.Background(), slogLevel(e.Level), e.Message, arguments(fields)...)
	return nil
}

func (z zapToSlog) Sync() error { return nil }

// arguments are the fields as slog takes them, in their order.
func arguments(fields []zapcore.Field) []any {
	args := make([]any, 0, len(fields))
	for _, f := range fields {
		enc := zapcore.NewMapObjectEncoder()
		f.AddTo(enc)
		for key, value := range enc.Fields {
			if key == "error" {
				key = "err"
			}
			args = append(args, slog.Any(key, value))
		}
	}
	return args
}
