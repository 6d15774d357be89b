import java.net.HttpURLConnection;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;
import java.time.Duration;

/**
 * Fetches each URL that is given by both of the JDK's HTTP clients, and prints what both got, one line for each URL. The JVM has IPv6
 * sockets alone, and reaches IPv4 addresses by IPv4-mapped ones.
 */
final class Get {
  private static final Duration PATIENCE = Duration.ofSeconds(5);

  public static void main(String[] args) throws Exception {
    for (var url : args) {
      var uri = URI.create(url);
      var answer = byConnection(uri);
      var other = byClient(uri);
      if (!answer.equals(other)) {
        throw new IllegalStateException(url + " is answered with " + answer + " and " + other);
      }
      System.out.println(answer);
    }
  }

  private static String byConnection(URI uri) throws Exception {
    var connection = (HttpURLConnection) uri.toURL().openConnection();
    connection.setConnectTimeout((int) PATIENCE.toMillis());
    connection.setReadTimeout((int) PATIENCE.toMillis());
    var status = connection.getResponseCode();
    try (var body = connection.getInputStream()) {
      return status + " " + new String(body.readAllBytes());
    }
  }

  private static String byClient(URI uri) throws Exception {
    var client = HttpClient.newBuilder().connectTimeout(PATIENCE).build();
    var response = client.send(HttpRequest.newBuilder(uri).timeout(PATIENCE).build(), BodyHandlers.ofString());
    return response.statusCode() + " " + response.body();
  }
}
